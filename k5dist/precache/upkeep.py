"""The stages `verify` and `prune`: whether the cache still holds what was written, and taking out what no run wants."""

from __future__ import annotations

from collections.abc import Iterator

from k5dist import storage
from k5dist.cache import layout, orders
from k5dist.cache.shards import ShardStore
from k5dist.cache.verify import Bad, feature_stores, prune, stores, verify, wanted_keys
from k5dist.console import progress_bar, say
from k5dist.plan import RunPlan

_SHOWN = 20


class CacheDamaged(Exception):
    """Some records of the cache are not what was written; the message names them."""


def verify_cache(plan: RunPlan, *, repair: bool) -> list[Bad]:
    """Hold every record of the cache against its checksum; with `repair` the bad ones leave the index.

    Returns the bad ones, of samples and of captions. What is removed is encoded again by the next precache.
    """
    layout.check_header(plan.cache_uri, plan.cache_fingerprint)
    found: list[Bad] = []
    for store in stores(plan.cache_uri):
        bad = list(_verify(store))
        if bad and repair:
            store.remove({record.key for record in bad})
        found += bad
    return found


def _verify(store: ShardStore) -> Iterator[Bad]:
    what = "samples" if "uri" in store.columns else "captions"
    with progress_bar(f"verify {what}", len(store.keys())) as bar:
        yield from verify(store, lambda: bar.advance(1))


def explain(bad: list[Bad]) -> str:
    """The damage in one block: each record's source or caption, and what is wrong with it."""
    lines = [f"  {record.name}: {record.reason}" for record in bad[:_SHOWN]]
    if len(bad) > _SHOWN:
        lines.append(f"  and {len(bad) - _SHOWN} more (verify.json among the run's artifacts names all)")
    return "\n".join(lines)


def prune_cache(plan: RunPlan) -> int:
    """Remove the samples that no run below `storage.root` was begun with; how many there were.

    Captions stay: they are small, and validation prompts and dropped captions share them.
    """
    layout.check_header(plan.cache_uri, plan.cache_fingerprint)
    storage.remove(storage.join(plan.cache_uri, orders.FOLDER))  # of jobs that never came back
    wanted = wanted_keys(storage.normalise(plan.config.storage.root))
    removed = prune(layout.samples(plan.cache_uri), wanted)
    for store in feature_stores(plan.cache_uri):
        prune(store, wanted)
    say(f"prune: {removed} samples that no run was begun with are gone from {plan.cache_uri}")
    return removed

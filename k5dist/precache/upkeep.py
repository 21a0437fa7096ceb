"""The stages `verify` and `prune`: whether the cache still holds what was written, and taking out what no run wants."""

from __future__ import annotations

from functools import partial

from k5dist import storage
from k5dist.cache import layout, orders
from k5dist.cache.verify import Bad, feature_stores, prune, stores, verify, wanted_keys
from k5dist.console import progress_bar, say
from k5dist.plan import RunPlan

_SHOWN = 20


class CacheDamaged(Exception):
    """Some records of the cache are not what was written; the message names them."""


def verify_cache(plan: RunPlan, *, repair: bool) -> list[Bad]:
    """Hold every record of the cache against its checksum; with `repair` the bad ones leave the index.

    Returns the bad ones, of samples, captions and CREPA's features. What is removed is encoded again by the next
    precache that uses it.
    """
    layout.check_header(plan.cache_uri, plan.cache_fingerprint)
    found: list[Bad] = []
    samples = layout.samples(plan.cache_uri)
    features = {store.uri for store in feature_stores(plan.cache_uri)}
    for store in stores(plan.cache_uri):
        what = "features" if store.uri in features else "samples" if store.uri == samples.uri else "captions"
        with progress_bar(f"verify {what}", len(store.keys())) as bar:
            held = samples if what == "features" else None
            bad = list(verify(store, partial(bar.advance, 1), samples=held))
        if bad and repair:
            store.remove({record.key for record in bad})
        found += bad
    return found


def explain(bad: list[Bad]) -> str:
    """The damage in one block: each record's source or caption, and what is wrong with it."""
    lines = [f"  {record.name}: {record.reason}" for record in bad[:_SHOWN]]
    if len(bad) > _SHOWN:
        lines.append(f"  and {len(bad) - _SHOWN} more (verify.json among the run's artifacts names all)")
    return "\n".join(lines)


def prune_cache(plan: RunPlan) -> int:
    """Remove the samples that no run below `storage.root` was begun with; how many there were.

    So go CREPA's features of samples that no run with their encoder was begun with. Captions stay: they are small, and
    validation prompts and dropped captions share them.
    """
    layout.check_header(plan.cache_uri, plan.cache_fingerprint)
    for store in stores(plan.cache_uri):
        storage.remove(storage.join(store.uri, orders.FOLDER))  # of jobs that never came back
    root = storage.normalise(plan.config.storage.root)
    removed = prune(layout.samples(plan.cache_uri), wanted_keys(root))
    of_features = sum(
        prune(store, wanted_keys(root, store.uri.rsplit("/", 1)[-1])) for store in feature_stores(plan.cache_uri)
    )
    told = f"{removed} samples" + (f" and the features of {of_features}" if of_features else "")
    say(f"prune: {told} that no run was begun with are gone from {plan.cache_uri}")
    return removed

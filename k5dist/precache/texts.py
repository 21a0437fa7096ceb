"""The texts of a run through the text encoders, batched by length, into the cache; each text once."""

from __future__ import annotations

from functools import partial

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from k5dist import storage
from k5dist.cache import layout, orders
from k5dist.config import RunConfig
from k5dist.console import progress_bar, say
from k5dist.plan import RunPlan
from k5dist.precache import stages, stream
from k5dist.precache.attempts import Attempts
from k5dist.precache.sources import Listing
from k5dist.precache.summary import Summary


def wanted_captions(config: RunConfig, *captions: pa.ChunkedArray) -> list[str]:
    """Every text that training and validation will ask for, once each; the empty prompt is the dropped caption.

    `captions` are columns of lists of texts.
    """
    texts = prompts(config)
    for column in captions:
        texts += pc.unique(pc.list_flatten(column)).to_pylist()
    return list(dict.fromkeys(texts))


def prompts(config: RunConfig) -> list[str]:
    """Texts that are asked for whatever the data."""
    return ["", config.validation.negative_prompt, *config.validation.prompts]


def all_captions(plan: RunPlan, listing: Listing) -> list[str]:
    """Those of the data as it is now, and of the samples that the run began with."""
    uri = storage.join(plan.run_uri, layout.SELECTION)
    begun = [layout.read_selected(uri).column("captions")] if storage.exists(uri) else []
    return wanted_captions(plan.config, listing.rows.column("captions"), *begun)


@ray.remote(num_cpus=0)
def installed_encoding(config: RunConfig) -> layout.TextEncoding:
    from k5dist.model.encoders import text_encoding

    precache = config.precache
    return text_encoding(precache.prompt_template, precache.prompt_template_start, precache.max_text_tokens)


def encode_captions(plan: RunPlan, encoding: layout.TextEncoding, texts: list[str], summary: Summary) -> None:
    """Bring the features of `texts` that the cache lacks into it."""
    store = layout.captions(plan.cache_uri, encoding)
    config = plan.config.precache
    batch, row_bytes = config.text_batch_size, 2 * config.max_text_tokens * plan.config.model.in_text_dim
    # Captions of about one length make batches with little padding. A batch's padding shows in the last bits of its
    # features: the orders fix batches as well as shards.
    rows = {layout.caption_key(text): {"caption": text} for text in sorted(texts, key=lambda text: (len(text), text))}
    known, groups = orders.settle(store, list(rows), _whole_batches(plan.rows_per_shard(row_bytes), batch))
    if not groups:
        say(f"captions: all {len(texts)} are in the cache, nothing to encode")
        orders.finish(store, known)
        return
    todo = sum(key is not None for group in groups for key in group)
    device, pool = plan.world.device, plan.pools.text
    table, length = stream.grouped({key: {"key": key, **row} for key, row in rows.items()}, groups, multiple=batch)
    attempts = Attempts()
    dataset = ray.data.from_arrow(stream.slices(table, batch)).map_batches(
        stages.TextStage,
        batch_size=batch,
        fn_constructor_args=(plan.pretrained, device, encoding, attempts, config.offload_during_startup),
        # No more workers than they have batches: each loads 15 GiB of weights.
        compute=ray.data.ActorPoolStrategy(size=min(pool.workers, -(-table.num_rows // batch))),
        **stream.resources(pool),
    )
    dataset = dataset.map_batches(
        partial(stages.write_captions, cache_uri=plan.cache_uri, encoding=encoding, attempts=attempts),
        batch_format="pyarrow",
        batch_size=length,
        num_cpus=0.25,
    )
    with progress_bar("captions", todo) as bar:
        stream.consume(dataset, lambda table: bar.advance(table.num_rows))
    orders.finish(store, known | rows.keys())
    summary.captions_encoded = todo


def _whole_batches(rows: int, batch: int) -> int:
    return -(-rows // batch) * batch

#!/usr/bin/env bash
# The measurements of docs/performance.md, again on this machine: launch/benchmark.sh one|memory|two [folder] [name…]
# `one` and `memory` need one GPU with 140 GiB, `two` needs two; every figure lands as JSON in the folder (default:
# benchmarks). `memory` holds a Pro of eight blocks against the plan's estimate, for each policy of recomputation.
set -uo pipefail
cd "$(dirname "$0")/.."
gpus=${1:?one, memory or two} out=${2:-benchmarks}
shift $(($# < 2 ? $# : 2))
wanted=("$@")
mkdir -p "$out"
failed=0
SD="data.num_frames=121 data.resolution=[512,768]"
HD="data.resolution=[768,1280]"
DENSE=model.attention_type=regular
# With the extra `flash4` installed dense attention runs FlashAttention 4.
FLASH=train.attention=$(python3 -c 'from importlib.util import find_spec; print("flash4" if find_spec("flash_attn") else "auto")')

measure() { # name, seconds at most, command…
    local name=$1 limit=$2
    shift 2
    if ((${#wanted[@]})) && [[ " ${wanted[*]} " != *" $name "* ]]; then return; fi
    echo "== $name"
    local start=$SECONDS
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$out/$name.log" || { failed=1 && echo "$name: failed"; }
    echo "== $name took $((SECONDS - start)) s"
}
train() { # name, seconds at most, overrides…
    local name=$1 limit=$2
    shift 2
    measure "$name" "$limit" python3 -m k5dist.benchmark train "$@" "benchmark.out=$out/$name.json"
}

# shellcheck disable=SC2086  # the sizes are two words
if [[ $gpus == one ]]; then
    measure nabla-kernels 300 python3 -m k5dist.benchmark nabla --out "$out/nabla-kernels.json"
    measure attention 240 python3 -m k5dist.benchmark attention --out "$out/attention.json"
    measure vae 480 python3 -m k5dist.benchmark vae --out "$out/vae.json"
    measure text 240 python3 -m k5dist.benchmark text --out "$out/text.json"
    train pro-hd-block 240 +flavour=t2v-pro-sft-5s-hd data.num_frames=121 $HD lora.rank=32 benchmark.blocks=1 \
        benchmark.density=0.2 benchmark.baseline=diffusers
    train lite-full 420 +flavour=t2v-lite-sft-5s adapter=full $SD $FLASH benchmark.baseline=diffusers
    train lite-lora 240 +flavour=t2v-lite-sft-5s $SD
    train lite-lora-12gib 240 +flavour=t2v-lite-sft-5s $SD train.stream_weights=true train.gpu_memory_gib=12
    train pro-lora-24gib 420 +flavour=t2v-pro-sft-5s-hd $DENSE $SD train.stream_weights=true train.gpu_memory_gib=24 \
        train.offload_gib=40 benchmark.profile=false
    measure methods 900 python3 -m k5dist.benchmark methods +flavour=t2v-pro-sft-5s-hd $DENSE $SD benchmark.blocks=4 \
        benchmark.profile=false "benchmark.out=$out/methods.json"
elif [[ $gpus == memory ]]; then
    for adapter in lora full; do
        for policy in full attention linear; do
            train "memory-$adapter-$policy" 150 +flavour=t2v-pro-sft-5s-hd $DENSE $SD \
                "adapter=$adapter" "train.activation_checkpointing=$policy" benchmark.blocks=8 benchmark.steps=1 \
                benchmark.warmup=1 benchmark.profile=false
        done
    done
else
    train pro-lora 300 +flavour=t2v-pro-sft-5s-hd $DENSE lora.rank=32 $SD $FLASH
    train pro-full 420 +flavour=t2v-pro-sft-5s-hd $DENSE adapter=full \
        optimizer.kind=adamw_bf16 $SD $FLASH
    train pro-lora-float8 300 +flavour=t2v-pro-sft-5s-hd $DENSE lora.rank=32 $SD \
        train.float8=true
    train pro-10s-hd 420 +flavour=t2v-pro-sft-10s-hd $HD lora.rank=32 parallel.context=2 benchmark.steps=1 \
        benchmark.warmup=1 benchmark.profile=false
    measure pro-load 420 python3 -m k5dist.benchmark load +flavour=t2v-pro-sft-5s-hd \
        "benchmark.checkpoint=$out/checkpoint" "benchmark.out=$out/pro-load.json"
    rm -rf "$out/checkpoint"
fi
exit $failed

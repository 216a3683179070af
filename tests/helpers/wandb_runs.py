"""Offline W&B runs, read back from their files."""

import json
import struct
import time

from svf_lightning.wandb_logger import STEP_METRIC


class Logged:
    """An offline run, read from W&B's file: LevelDB's log format after a header of 7 bytes."""

    def __init__(self, folder):
        from wandb.proto.wandb_internal_pb2 import Record

        self.config, self.history, self.summary, self.artifacts, self.exit_code = {}, [], {}, [], None
        for payload in _payloads(next(folder.glob("*.wandb")).read_bytes()):
            record = Record()
            record.ParseFromString(payload)
            if record.HasField("run"):
                self.run = record.run
            for item in record.config.update:
                self.config[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
            for item in record.summary.update:
                self.summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
            if record.HasField("history"):
                self.history.append(_row(record.history.item))
            if record.HasField("request") and record.request.HasField("log_artifact"):
                self.artifacts.append(record.request.log_artifact.artifact)
            if record.HasField("artifact"):
                self.artifacts.append(record.artifact)
            if record.HasField("exit"):
                self.exit_code = record.exit.exit_code
        self.config.pop("_wandb", None)

    @property
    def about(self):
        run = self.run
        return run.run_id, run.project, run.entity, run.display_name, run.run_group, run.job_type, list(run.tags)

    @property
    def steps(self):
        return [int(row[STEP_METRIC]) for row in self.history]


def _row(items):
    """Numbers as texts, so that NaN equals NaN; media by what is in their files, as they lie where W&B likes."""
    row = {}
    for item in items:
        name, *inner = item.nested_key or [item.key]
        if not name.startswith("_") and inner in ([], ["sha256"]):  # W&B's own clock and counter aside
            row[name] = item.value_json
    return row


def _payloads(data, block=32768):
    at, part = 7, b""
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
        _, size, kind = struct.unpack_from("<IHB", data, at)
        part += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield part
            part = b""


def offline_runs(run_dir):
    return sorted((run_dir / "wandb").glob("offline-run-*"))


def published(run_dir):
    (folder,) = offline_runs(run_dir)
    return Logged(folder)


def live_run(run_dir):
    """That of `fit` itself; W&B's process writes on for a moment after the run has finished."""
    deadline = time.monotonic() + 30
    while (logged := published(run_dir)).exit_code is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return logged


def table_of(run_dir, name):
    """Rows of a table in the run's only offline run."""
    (file,) = (offline_runs(run_dir)[0] / "files" / "media" / "table" / "tables").glob(f"{name}_*.json")
    table = json.loads(file.read_text())
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]

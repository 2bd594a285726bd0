"""Metric writers and the stopwatch."""

import json
import math
import resource
import struct
import sys
import types

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from wallx_jax.training.metrics import MetricWriter, Stopwatch


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_jsonl_lines_are_flushed_and_strict(tmp_path):
    writer = MetricWriter(tmp_path / "run")
    writer.write(10, {"loss": np.float32(0.5), "grad_norm": float("nan"), "lr": np.array([1e-4])[0]})
    (line,) = lines(tmp_path / "run")  # before close
    assert line == {"step": 10, "time": line["time"], "loss": 0.5, "grad_norm": None, "lr": 1e-4}
    assert line["time"] > 1.6e9
    writer.close()
    writer.write(11, {"loss": 0.1})
    writer.close()
    assert len(lines(tmp_path / "run")) == 1
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


def test_resume_drops_later_and_torn_lines(tmp_path):
    writer = MetricWriter(tmp_path)
    for step in (1, 2, 3, 4):
        writer.write(step, {"loss": step})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    writer = MetricWriter(tmp_path, resumed_step=2)
    writer.write(3, {"loss": 30})
    writer.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 1), (2, 2), (3, 30)]


def test_a_new_run_keeps_the_old_file_aside(tmp_path):
    for loss in (1.0, 2.0):
        writer = MetricWriter(tmp_path)
        writer.write(1, {"loss": loss})
        writer.close()
    assert [line["loss"] for line in lines(tmp_path)] == [2.0]
    assert json.loads((tmp_path / "metrics.previous.jsonl").read_text())["loss"] == 1.0


def test_a_full_disk_costs_numbers_and_not_the_run(tmp_path, caplog):
    writer = MetricWriter(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # a write beyond fails, as on a full disk
    try:
        for step in range(1, 301):  # more than any buffer or queue takes
            writer.write(step, {"loss": 0.5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    writer.write(301, {"loss": 0.5})  # somebody has made room
    writer.close()
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        f"{tmp_path / name} cannot be written (File too large): numbers will be missing"
        for name in ("metrics.jsonl", "tensorboard")
    ]
    steps = [line["step"] for line in lines(tmp_path)]
    assert steps[:20] == list(range(1, 21)) and steps[-1] == 301 and steps == sorted(set(steps))


def test_closing_on_a_full_disk(tmp_path, caplog):
    writer = MetricWriter(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        writer.write(1, {"loss": 0.5})
        writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(caplog.records) == 2


def events(file):
    """The records of an event file: length, its checksum, content, its checksum."""
    data, found = file.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        found.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found


@pytest.mark.parametrize("resumed_step", [None, 2])
def test_what_tensorboard_reads(tmp_path, resumed_step):
    writer = MetricWriter(tmp_path, resumed_step=resumed_step)
    writer.write(3, {"loss": np.float32(0.5), "val_loss/a b": float("nan")})
    (file,) = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    first, *more = events(file)  # before close
    assert first.file_version == "brain.Event:2"
    if resumed_step is not None:  # later events of earlier files are hidden
        start, *more = more
        assert start.step == 3 and start.session_log.status == start.session_log.START
    values = {event.summary.value[0].tag: event.summary.value[0].simple_value for event in more}
    assert [event.step for event in more] == [3, 3]
    assert values["loss"] == 0.5 and math.isnan(values["val_loss/a_b"])
    writer.close()


@pytest.mark.parametrize(
    ("module", "options", "remedy"),
    [
        ("tensorboardX", {}, r"wallx-jax\[train\]"),
        ("wandb", {"use_wandb": True}, r"wallx-jax\[wandb\].*use_wandb=False"),
    ],
)
def test_a_missing_package_says_how_to_get_it(tmp_path, monkeypatch, module, options, remedy):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"{module} is needed.*{remedy}"):
        MetricWriter(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_wandb_gets_scalars_and_a_resumed_run_continues(tmp_path, monkeypatch):
    calls = []

    def init(**options):
        calls.append(options)
        return types.SimpleNamespace(
            id="abc", log=lambda *a, **k: calls.append((a, k)), finish=lambda: calls.append("end")
        )

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    writer = MetricWriter(tmp_path, use_wandb=True, project="p", name="n", config={"lr": 1})
    writer.write(5, {"loss": 0.5})
    writer.close()
    assert calls[0]["project"] == "p" and calls[0]["name"] == "n" and calls[0]["config"] == {"lr": 1}
    assert calls[0]["id"] is None
    assert calls[1:] == [(({"loss": 0.5},), {"step": 5}), "end"]
    MetricWriter(tmp_path, use_wandb=True, resumed_step=5).close()
    assert calls[3]["id"] == "abc" and calls[3]["resume"] == "allow"
    MetricWriter(tmp_path, use_wandb=True).close()  # a new run is a new wandb run
    assert calls[5]["id"] is None


def test_wandb_is_not_needed_unless_asked(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    MetricWriter(tmp_path).close()


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_stopwatch():
    clock = Clock()
    watch = Stopwatch(clock)
    assert watch.eta_s(10) is None
    clock.now += 50  # compilation
    watch.restart()
    for _ in range(4):
        with watch("data_wait"):
            clock.now += 0.5
        clock.now += 1.5
    with watch.paused():
        clock.now += 1000
    assert watch.summary(steps=4, samples=32) == {"step_time_s": 2.0, "samples_per_s": 4.0, "data_wait_share": 0.25}
    assert watch.eta_s(10) == 20.0
    clock.now += 3
    assert watch.summary(steps=1, samples=6) == {"step_time_s": 3.0, "samples_per_s": 2.0}
    assert math.isfinite(watch.summary(steps=0, samples=0)["samples_per_s"])


def test_stopwatch_counts_a_wait_that_fails():
    clock = Clock()
    watch = Stopwatch(clock)
    with pytest.raises(KeyError), watch("data_wait"):
        clock.now += 1
        raise KeyError
    clock.now += 1
    assert watch.summary(1, 1)["data_wait_share"] == 0.5


def test_names_with_any_characters_cause_no_log_lines(tmp_path, caplog):
    """tensorboardX logs every name that it has to change, at every step."""
    caplog.set_level("INFO")
    writer = MetricWriter(tmp_path)
    writer.write(1, {"learning_rate/rule:^vision/(a|b)": 1e-5})
    writer.close()
    assert not caplog.records
    assert "learning_rate/rule:^vision/(a|b)" in (tmp_path / "metrics.jsonl").read_text()

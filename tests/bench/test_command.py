import argparse
import json
import shlex

import pytest

from tlk.bench import command
from tlk.bench.command import FLAGS, SWITCHES, add_arguments, run
from tlk.bench.serving import ServingOptions


def parse(kind, *words):
    parser = argparse.ArgumentParser()
    add_arguments(parser, kind)
    return vars(parser.parse_args(words))


@pytest.mark.parametrize("kind", ["throughput", "latency"])
def test_without_flags_all_is_as_the_options_have_it(kind):
    values = parse(kind, "m")
    assert values.pop("json_file") is None
    assert ServingOptions(**values) == ServingOptions(model="m")


def test_every_flag_is_an_option():
    fields = set(ServingOptions.__dataclass_fields__)
    given = {*FLAGS, *SWITCHES, "model", "random_weights", "num_prompts", "batch_size", "compare"}
    assert fields == given | {"dtype", "device"}  # these two are added with every command's


def test_a_recorded_command_parses_to_what_was_measured():
    options = ServingOptions(
        random_weights="tiny", input_len=7, num_prompts=3, profile=True, compare="transformers",
        temperature=0.5, warmup=0, max_model_len=99,
    )  # fmt: skip
    words = shlex.split(options.command("throughput"))
    assert words[:3] == ["tlk", "bench", "throughput"]
    values = parse("throughput", *words[3:])
    del values["json_file"]
    assert ServingOptions(**values) == options


def test_it_prints_and_writes(tmp_path, capsys):
    file = tmp_path / "r.json"
    status = run(
        "latency", file, random_weights="tiny", device="cpu", input_len=4, output_len=2,
        max_model_len=48, kv_cache_memory=1 << 20, profile=True, repeats=1, warmup=0,
    )  # fmt: skip
    out = capsys.readouterr().out
    assert status == 0 and "avg_latency" in out and "one step, " in out and "attention" in out
    assert json.loads(file.read_text())["benchmark"] == "latency"


def test_without_a_profile_there_is_no_table(monkeypatch, capsys):
    monkeypatch.setattr(command, "measure", lambda kind, options: {"profile": None})
    monkeypatch.setattr(command, "show", lambda record: "figures")
    assert run("latency", model="m") == 0
    assert capsys.readouterr().out == "figures\n"

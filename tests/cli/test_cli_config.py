"""`interlace config`, `config explain` and `config plan`."""

from __future__ import annotations

import json

import pytest

from interlace import cli
from interlace.config import all_settings


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["config", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_values_and_sources(capsys, monkeypatch, tmp_path):
    file = tmp_path / "engine.toml"
    file.write_text("[scheduler.options.priority]\naging_s = 5\n")
    monkeypatch.setenv("INTERLACE_SEED", "3")
    code, out, _ = run(capsys, "--config", str(file), "--scheduler.use", "priority")
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in out.splitlines()}
    assert code == 0
    assert rows["KEY"] == ["VALUE", "SOURCE"]
    assert rows["scheduler.use"] == ["priority", "command line"]
    assert rows["seed"] == ["3", "environment INTERLACE_SEED"]
    assert rows["scheduler.options.priority.aging_s"] == ["5", "file engine.toml"]
    assert rows["dtype"] == ["auto", "default"]
    assert {setting.key for setting in all_settings() if not setting.key.endswith(".options")} <= set(rows)


def test_json(capsys):
    code, out, _ = run(capsys, "--json", "--cache.memory=25%")
    told = json.loads(out)
    assert code == 0
    assert told["settings"]["cache"]["memory"] == "25%"
    assert told["sources"]["cache.memory"] == "command line" and told["sources"]["seed"] == "default"


@pytest.mark.parametrize("arguments", [[], ["--json"], ["explain", "server.api_keys"], ["explain", "server"]])
def test_keys_are_never_printed(capsys, arguments):
    code, out, err = run(capsys, *arguments, "--server.api_keys", "hunter2,hunter3")
    assert code == 0 and "hunter" not in out + err and "***" in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--scheduler.use", "prority"], "(scheduler.use, command line). Did you mean 'priority'?"),
        (["--scheduler.options.priority.agin_s", "3"], "Did you mean 'scheduler.options.priority.aging_s'?"),
        (["--scheduler.options.priority.aging_s", "-1"], "scheduler.options.priority.aging_s = '-1' (command line): "),
    ],
)
def test_wrong_plugins_and_options_fail(capsys, arguments, expected):
    code, _, err = run(capsys, *arguments)
    assert code == 2 and expected in err


def test_explain_a_setting(capsys, monkeypatch):
    monkeypatch.setenv("INTERLACE_SCHEDULER__MAX_NUM_SEQS", "12")
    code, out, _ = run(capsys, "explain", "scheduler.max_num_seqs")
    assert code == 0
    for line in (
        "How many requests may run at the same time.",
        "type:        integer, at least 1",
        "default:     256",
        "here:        12 (environment INTERLACE_SCHEDULER__MAX_NUM_SEQS)",
        "flag:        --scheduler.max_num_seqs",
    ):
        assert line in out


def test_explain_an_option_of_a_plugin(capsys):
    key = "scheduler.options.priority.aging_s"
    code, out, _ = run(capsys, "explain", key)
    assert code == 0 and "type:        number, at least 0" in out and "here:        0.0 (default)" in out
    assert "here:        30.0 (command line)" in run(capsys, "explain", key, f"--{key}", "30")[1]
    assert f"  {key}: number, at least 0" in run(capsys, "explain", "scheduler.options.priority")[1]


def test_explain_an_option_of_a_third_party_plugin(capsys, install):
    install("demo")
    out = run(capsys, "explain", "scheduler.options.demo.weights.gold")[1]
    assert "Weight of gold requests." in out and "default:     2.0" in out and "here:        2.0 (default)" in out
    flag = ["--scheduler.options.demo.token", "hunter2"]
    out = run(capsys, "explain", "scheduler.options.demo.token", *flag)[1]
    assert "here:        *** (command line)" in out and "hunter2" not in out


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (
            "scheduler.max_num_seq",
            "there is no setting 'scheduler.max_num_seq'. Did you mean 'scheduler.max_num_seqs'?",
        ),
        ("xyzzy", "there is no setting 'xyzzy'. Known: model, dtype"),
        ("scheduler.options.prority.aging_s", "no scheduler is called 'prority'"),
        ("scheduler.options.priority.agin", "Did you mean 'scheduler.options.priority.aging_s'?"),
        ("schedulr.options.priority.aging_s", "Did you mean 'scheduler'?"),
    ],
)
def test_explain_what_does_not_exist(capsys, key, expected):
    code, _, err = run(capsys, "explain", key)
    assert code == 2 and expected in err


def test_plan_shows_components_and_memory(capsys):
    settings = ["--cache.memory", "8MiB", "--scheduler.use", "priority", "--device", "cpu", "--dtype", "float32"]
    code, out, _ = run(capsys, "plan", "--json", *settings)
    plan = json.loads(out)
    assert code == 0
    chosen = {part["kind"]: part for part in plan["components"]}
    assert chosen["schedulers"]["name"] == "priority"
    assert chosen["schedulers"]["reason"] == "scheduler.use, command line"
    assert (chosen["models"]["name"], chosen["checkpoints"]["name"]) == ("LlamaForCausalLM", "gguf")
    # SmolLM2-135M in float32: 30 layers of 3 KV heads of 64, keys and values.
    assert plan["kv"]["num_blocks"] == 8 * 2**20 // (30 * 2 * 3 * 64 * 4 * plan["kv"]["block_size"])
    assert plan["memory"]["kv_bytes"] <= 8 * 2**20
    assert 134e6 * 4 < plan["memory"]["weights_bytes"] < 136e6 * 4
    code, out, _ = run(capsys, "plan", *settings)
    assert (
        code == 0 and f"KV cache: {plan['kv']['num_blocks']} blocks of 32 tokens" in out and "LlamaForCausalLM" in out
    )


def test_plan_shows_what_each_rank_holds(capsys):
    settings = ["--executor.use", "multiprocess", "--cache.memory", "8MiB", "--dtype", "float32", "--device", "cpu"]
    options = "--executor.options.multiprocess."
    code, out, _ = run(
        capsys, "plan", "--json", *settings, f"{options}tensor_parallel", "2", f"{options}pipeline_parallel", "2"
    )
    plan = json.loads(out)
    assert code == 0
    shown = [
        (rank["rank"], rank["stage"], rank["layers"], rank["heads"], rank["kv_heads"], rank["device"])
        for rank in plan["ranks"]
    ]
    assert shown == [
        (0, 0, [0, 19], 6, 2, "cpu"),
        (1, 0, [0, 19], 3, 1, "cpu"),
        (2, 1, [19, 30], 6, 2, "cpu"),
        (3, 1, [19, 30], 3, 1, "cpu"),
    ]
    # The first rank has room for the fewest blocks; 19 layers, keys and values, 2 heads of 64 in float32.
    assert plan["kv"]["num_blocks"] == 8 * 2**20 // (19 * 2 * 2 * 64 * 4 * plan["kv"]["block_size"])
    weights = [rank["weights_bytes"] for rank in plan["ranks"]]
    assert plan["memory"]["weights_bytes"] == sum(weights)
    # The tied embedding is on both stages: 49152 rows of 576.
    whole = 134_515_008 * 4 + 49152 * 576 * 4
    assert whole <= sum(weights) < 1.001 * whole, "but for the norms, nothing is there twice"
    assert plan["memory"]["kv_bytes"] == sum(rank["kv_bytes"] for rank in plan["ranks"])
    code, out, _ = run(capsys, "plan", *settings, f"{options}tensor_parallel", "3")
    rows = [line.split()[:6] for line in out.splitlines() if line.split()[1:3] == ["0", "cpu"]]
    assert code == 0 and rows == [[str(rank), "0", "cpu", "0-29", "3", "1"] for rank in range(3)]


def test_plan_refuses_what_cannot_be_split(capsys):
    code, _, err = run(
        capsys, "plan", "--executor.use", "multiprocess", "--executor.options.multiprocess.tensor_parallel", "10"
    )
    assert code == 2 and "executor option tensor_parallel = 10 is more than the model's 9 attention heads" in err

"""Reports on every rank, ranks that hold the others up, ranks that drifted apart."""

from __future__ import annotations

import logging
import re

import torch
from ranks import run_ranks
from test_engine import losses
from toy import ToyModel

from itemizedclip.training.health import FILE, SLOW_REPORTS, HealthReport, RankHealth, checksums, prometheus


def ranks(*own_s: float, wait_s: float = 0.0) -> list[RankHealth]:
    return [RankHealth(r, f"node{r // 2}", max(own_s), own, wait_s, 100.0, 0) for r, own in enumerate(own_s)]


def test_the_text_for_prometheus():
    """Its grammar, by the rules of the exposition format: HELP and TYPE before the samples, labels quoted."""
    text = prometheus('a "run"\\x', 40, ranks(0.5, 0.25))
    assert text.endswith("\n")
    sample = re.compile(r'itemizedclip_[a-z_]+\{(?:[a-z]+="(?:[^"\\\n]|\\["\\n])*",?)+\} -?[0-9.e+]+')
    announced: set[str] = set()
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            announced.add(line.split()[2])
        elif not line.startswith("# HELP "):
            assert sample.fullmatch(line), line
            assert line.partition("{")[0] in announced
    assert 'itemizedclip_steps_total{run="a \\"run\\"\\\\x"} 40' in text
    assert 'itemizedclip_own_seconds{run="a \\"run\\"\\\\x",rank="1",host="node0"} 0.25' in text
    assert text.count('rank="1"') == 5


def test_a_rank_that_is_slow_for_long_is_named_once_and_forgiven(tmp_path, caplog):
    report = HealthReport(tmp_path, True, 10)
    with caplog.at_level(logging.INFO):
        for _ in range(SLOW_REPORTS - 1):
            report._look_for_slow(ranks(1.0, 1.0, 1.0, 1.5))
        report._look_for_slow(ranks(1.0, 1.1, 1.0, 1.0))  # once is not for long
        assert caplog.text == ""
        for _ in range(SLOW_REPORTS + 2):
            report._look_for_slow(ranks(1.0, 1.0, 1.0, 1.5))
        assert caplog.text.count("rank 3 on node1 holds the others up: 1.5 s a step of its own, the median is 1 s") == 1
        assert "look at its GPU or processor" in caplog.text
        report._look_for_slow(ranks(1.0, 1.0, 1.0, 1.0))
        assert "rank 3 on node1 is as fast as the others again" in caplog.text
        for _ in range(SLOW_REPORTS):
            report._look_for_slow(ranks(1.0, 1.0, 1.0, 1.5, wait_s=0.4))
        assert "look at data" in caplog.text


def test_reports_come_when_they_are_due():
    report = HealthReport(None, True, 100)
    assert [step for step in (1, 99, 100) if report.is_due(step)] == [100]
    report.reported = 100
    assert [step for step in (110, 190, 205) if report.is_due(step)] == [205]
    assert not HealthReport(None, True, 0).is_due(100)


def test_any_bit_of_any_parameter_changes_its_sum():
    model = ToyModel()
    names, before = checksums(model)
    assert len(names) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            flat = parameter.view(-1)
            flat[-1] = torch.nextafter(flat[-1], torch.tensor(9.0))
        after = checksums(model)[1]
        assert [n for n, a, b in zip(names, before, after) if a != b] == [name]
        before = after


def test_two_ranks_report_the_slow_one_is_named_and_drift_ends_the_run(tmp_path):
    base = ["--logs", tmp_path, "--samples", 64, "--batch-size", 2, "--epochs", 1, "--val-frequency", 0]
    slow = [*base, "--name", "slow", "--slow-s", 0.3, "--health-every", 4, "--log-every-n-steps", 2]
    drift = [*base, "--name", "drift", "--drift-at", 5, "--check-ranks-every", 4, "--save-every-steps", 4]
    told = run_ranks(2, [*slow, "+", *drift], tmp_path / "told.txt", fails=True)
    log = (tmp_path / "slow/log.txt").read_text()
    assert "finished after 16 of 16 steps" in log
    reports = re.findall(
        r"rank (\d) on (\S+): step \S+ s, own (\S+) s, data wait \S+ s, memory (\d+) MiB, 0 samples", log
    )
    assert len(reports) == 2 * 4
    assert all(float(own) > 0.29 for rank, _, own, _ in reports if rank == "1")
    assert re.search(r"rank 1 on \S+ holds the others up", log)
    assert 'run="slow",rank="1"' in (tmp_path / "slow" / FILE).read_text()
    assert len(losses(tmp_path / "drift")) == 8, "drifted in step 5, found after step 8"
    assert told.count("the ranks no longer hold the same model: at step 8, image.patches.weight of rank ") == 2
    assert "go on from a checkpoint of step 4 or before" in told

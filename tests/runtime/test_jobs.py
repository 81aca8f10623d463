"""Jobs in processes of their own."""

from __future__ import annotations

from jobs_that_end import end_somehow

from itemizedclip.runtime.jobs import run_jobs


def test_a_bad_job_takes_nothing_else_down(tmp_path):
    jobs = [(number, str(tmp_path)) for number in range(6)]
    ends = {end.job: end.failure for end in run_jobs(end_somehow, jobs, workers=3, time_limit_s=15)}
    assert ends[1] == "its process was ended by SIGKILL (mostly: memory used up)"
    assert ends[2] == "took longer than 0.25 minutes"
    assert ends[3] == "its process ended with status 7"
    assert [ends[number] for number in (0, 4, 5)] == ["", "", ""]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "4", "5"]

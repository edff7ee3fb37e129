"""The ratio of a Ray job is taken within each round."""

from __future__ import annotations

from typing import Any

from bench import ray


def job(rate: float) -> dict[str, Any]:
    return {"images_per_second": rate, "cores": {"driver": 0.1, "workers": 0.2, "daemons": 0.3}, "seconds": 9.0}


def test_ratios_are_of_one_round_and_medians_over_rounds() -> None:
    rounds = [{"extract_many": job(plain), "ray": job(mine)} for plain, mine in ((100, 95), (1000, 800), (500, 450))]
    plain, mine = (ray.figures(way, rounds) for way in ray.WAYS)
    assert (plain["of_extract_many"], plain["images_per_second"]) == (1.0, 500)
    assert mine["of_extract_many"] == 0.9
    assert (mine["least_ratio"], mine["most_ratio"]) == (0.8, 0.95)
    assert (mine["driver_cores"], mine["workers_cores"], mine["daemons_cores"]) == (0.1, 0.2, 0.3)
    assert "goal of the Ray job: 0.9 of extract_many" in ray.show({"goal": ray.GOAL, "rows": [plain, mine]})

"""The arms of a comparison: guided alike, each in its own number of steps, refused where they cannot be compared."""

import pytest

from flashu import InputError
from jobs.arms import ArmsConfig, check_arms, describe_arms
from jobs.config import RunConfig, built_in_configs, read_config
from jobs.prepare import check_settings
from jobs.worker_model import flashu_settings

MODEL = "model.path=showlab/show-o2-1.5B"


def arms_of(*overrides, config=None):
    settings = read_config(config, [MODEL, *overrides], ArmsConfig)
    check_arms(settings)
    return settings


def of_run(config, arm):
    """How a run of an arm is guided, and its steps: the call's scale, the schedule, and grid points."""
    run = config.run_config(arm, "prompts.parquet")
    settings = flashu_settings(run.flashu, run.sampling)
    check_settings(run)
    return run.sampling.guidance_scale, settings and settings.schedule, run.sampling.num_inference_steps


@pytest.mark.parametrize(
    ("overrides", "baseline", "schedule"),
    [
        ((), 10, ((24, 7.5), (11, 10))),
        (("sampling.guidance_scale=8",), 8, ((24, 6), (11, 8))),
        (("sampling.guidance_scale=7.3",), 7.3, ((24, 0.75 * 7.3), (11, 7.3))),
        (("flashu.schedule=[[20,3],[15,5]]",), 5, ((20, 3), (15, 5))),
        (("flashu.schedule=[]",), None, None),
        (("flashu.preset=few-steps", "sampling.guidance_scale=4"), 4, None),
    ],
)
def test_both_arms_end_at_the_same_guidance(overrides, baseline, schedule):
    config = arms_of(*overrides)
    assert of_run(config, "baseline")[:2] == (baseline, None)
    assert of_run(config, "flashu")[1] == schedule


def test_each_arm_takes_its_own_number_of_steps():
    config = arms_of("sampling.num_inference_steps=100", "flashu.num_inference_steps=35")
    assert (of_run(config, "baseline")[2], of_run(config, "flashu")[2]) == (100, 35)
    assert describe_arms(config).splitlines()[0] == "baseline: 100 points, guidance 10"
    assert describe_arms(config).splitlines()[1].startswith("flashu: 35 points; FFN pruning")
    same = arms_of("sampling.num_inference_steps=30", "flashu.tau=3")
    assert (of_run(same, "baseline")[2], of_run(same, "flashu")[2]) == (30, 30)


def test_arms_that_would_be_guided_otherwise_are_refused():
    with pytest.raises(InputError, match=r"ends at guidance 5 and sampling\.guidance_scale is 7\.5"):
        arms_of("flashu.schedule=[[20,3],[15,5]]", "sampling.guidance_scale=7.5")
    arms_of("flashu.schedule=[[20,3],[15,5]]", "sampling.guidance_scale=7.5", "arms=flashu")
    with pytest.raises(InputError, match="so the arm flashu would be the baseline"):
        arms_of("flashu.preset=off")
    with pytest.raises(InputError, match="arms is 'both'"):
        arms_of("arms=both")


@pytest.mark.parametrize("name", [name for name in built_in_configs() if name.startswith(("dpg-", "geneval-"))])
def test_the_benchmarks_configs_are_the_releases_settings(name):
    config = read_config(name, [], ArmsConfig)
    check_arms(config)
    guidance, steps = (10, 50) if name.startswith("dpg-") else (7.5, 100)
    assert of_run(config, "baseline") == (guidance, None, steps)
    assert of_run(config, "flashu")[1:] == (((24, 0.75 * guidance), (11, guidance)), 35)
    assert (config.sampling.num_images, config.output.image_format, config.sampling.time_shift) == (4, "png", 3.0)
    assert config.sampling.size == (512 if name.endswith("-hq") else 432)
    assert config.flashu.calibration == "release"


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("flashu.preset=off", "flashu.calibration=release"), "flashu.preset is off, so calibration would do nothing"),
        (("flashu.calibration=tokens",), "flashu.calibration is 'tokens'; choose one of: trajectories, release"),
        (("flashu.calibration=release", "flashu.scores=s.safetensors"), "flashu.calibration would do nothing"),
        (("flashu.num_inference_steps=90",), "flashu.num_inference_steps is 90, and flashu.preset=paper-1.5b is made"),
        (("sampling.guidance_scale=-1",), "sampling.guidance_scale"),
    ],
)
def test_settings_that_do_not_go_together_are_told(overrides, told):
    with pytest.raises(InputError) as raised:
        check_settings(read_config(None, [MODEL, *overrides], RunConfig))
    assert told in str(raised.value)

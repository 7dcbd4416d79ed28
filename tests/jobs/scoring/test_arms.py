"""The arms of a comparison: guided alike, each in its own number of steps, refused where they cannot be compared."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flashu import InputError
from flashu.acceleration.plan import make_plan
from jobs.driver.prepare import prepare
from jobs.scoring.arms import ArmsConfig, check_arms, check_guidance, describe_arms, resolved
from jobs.settings.acceleration import flashu_settings
from jobs.settings.checks import check_settings
from jobs.settings.config import RunConfig, built_in_configs, read_config
from manifests.plan import Manifest

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
    guidance = [last_scale(config, arm) for arm in ("baseline", "flashu")]
    assert guidance[0] == guidance[1]


def last_scale(config, arm):
    """At which guidance scale an arm makes its last step; 7.5 is a released model's own."""
    run = config.run_config(arm, "prompts.parquet")
    settings = flashu_settings(run.flashu, run.sampling)
    steps = settings.total_steps if settings else run.sampling.num_inference_steps or 50
    guidance = 7.5 if run.sampling.guidance_scale is None else run.sampling.guidance_scale
    return make_plan(settings, steps, guidance).steps[-1].guidance


@pytest.mark.parametrize("steps", [12, 24, 25, 26, 30])
@pytest.mark.parametrize("guidance", [(), ("sampling.guidance_scale=8",)])
def test_both_arms_end_at_the_same_guidance_in_fewer_steps_than_the_schedule_has(steps, guidance):
    config = arms_of(f"sampling.num_inference_steps={steps}", "flashu.tau=3", *guidance)
    assert last_scale(config, "baseline") == last_scale(config, "flashu")
    assert last_scale(config, "baseline") == (8 if guidance else 7.5 if steps <= 25 else 10)


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
        (("flashu.num_inference_steps=0",), "num_inference_steps is 0"),
        (("flashu.num_inference_steps=90",), "flashu.num_inference_steps is 90, and flashu.preset=paper-1.5b is made"),
        (("sampling.guidance_scale=-1",), "sampling.guidance_scale"),
    ],
)
def test_settings_that_do_not_go_together_are_told(overrides, told):
    with pytest.raises(InputError) as raised:
        check_settings(read_config(None, [MODEL, *overrides], RunConfig))
    assert told in str(raised.value)


def test_what_null_comes_to_is_what_is_told():
    found = resolved(arms_of())
    assert found["sampling"]["guidance_scale"] == 10
    assert (found["sampling"]["num_inference_steps"], found["flashu"]["num_inference_steps"]) == (50, 35)
    assert found["flashu"]["calibration"] == "trajectories"
    assert resolved(arms_of("flashu.scores=s.safetensors"))["flashu"]["calibration"] is None
    assert resolved(arms_of("flashu.preset=few-steps"))["flashu"]["calibration"] is None


@pytest.fixture
def demo_run(tmp_path):
    return [f"output.path={tmp_path / 'run'}", "manifest.path=demo", "cluster.address=null", "flashu.preset=paper-1.5b"]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("sampling.num_inference_steps=100", "flashu.num_inference_steps=35"), "not sampling.num_inference_steps=100"),
        (("flashu.schedule=[[35,4]]", "sampling.guidance_scale=3"), "and not sampling.guidance_scale=3"),
        (("flashu.calibration=release", "flashu.r_p=0"), "so flashu.calibration does nothing"),
    ],
)
def test_a_setting_that_another_goes_before_is_told(demo_run, overrides, told):
    (note,) = [note for note in prepare(read_config(None, [*demo_run, *overrides])).notes if told in note]
    assert note


def test_a_run_that_was_begun_with_another_schedule_is_refused(demo_run, tmp_path):
    """As before a preset's schedule followed the guidance scale that was asked for."""
    config = read_config(None, [*demo_run, "sampling.guidance_scale=5"])
    prepare(config)
    file = tmp_path / "run" / "run.json"
    run = json.loads(file.read_text())
    assert run["guidance_schedule"] == [[24, 3.75], [11, 5.0]]
    prepare(config)  # goes on
    del run["guidance_schedule"]
    file.write_text(json.dumps(run))
    with pytest.raises(InputError) as raised:
        prepare(config)
    assert "guidance schedule was [[24, 7.5], [11, 10.0]] and is [[24, 3.75], [11, 5.0]]" in str(raised.value)
    unscaled = read_config(None, [f"output.path={tmp_path / 'other'}", *demo_run[1:]])
    prepare(unscaled)
    other = tmp_path / "other" / "run.json"
    run = json.loads(other.read_text())
    assert run.pop("guidance_schedule") == [[24, 7.5], [11, 10.0]]
    other.write_text(json.dumps(run))
    prepare(unscaled)


def test_a_manifest_that_guides_by_itself_is_refused_where_flashu_has_a_schedule(tmp_path):
    manifest = tmp_path / "prompts.parquet"
    pq.write_table(pa.table({"prompt_id": ["a"], "prompt": ["a red circle"], "guidance_scale": [3.0]}), manifest)
    opened = Manifest.open(str(manifest), shard_size=1)
    with pytest.raises(InputError, match="has guidance scales of its own"):
        check_guidance(arms_of(), opened)
    check_guidance(arms_of("flashu.schedule=[]"), opened)
    check_guidance(arms_of("arms=flashu"), opened)

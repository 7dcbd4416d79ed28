"""The plan as a table: what the paper's settings come to, step by step, and that no dead work enters any plan."""

import itertools

import pytest

from flashu import FLASHU_PRESETS, FlashUConfig, InputError
from flashu.acceleration.head_cache import Head
from flashu.acceleration.plan import Llm, make_plan

PAPER = FlashUConfig()
ALONE = {"r_p": 0, "r_LS": 0, "T_LS": None, "T_cache": None, "tau": 0, "schedule": None, "num_inference_steps": 12}


def steps_where(plan, test):
    return [step.number for step in plan.steps if test(step)]


def test_paper_settings_run_the_llm_on_17_steps_of_34():
    plan = make_plan(PAPER, 35, 10.0)
    assert steps_where(plan, lambda step: step.llm is not Llm.NONE) == [1, 2, 3, 4, 5, 10, 11, 15, 20, *range(25, 35)]
    assert steps_where(plan, lambda step: step.llm is Llm.FULL) == list(range(25, 35))
    assert steps_where(plan, lambda step: step.skip) == [2, 3, 4, 5, 10, 15, 20]


def test_a_measurement_that_no_step_uses_is_not_made():
    """Steps 1, 11 and 21 are due; after 21 nothing runs the LLM until the full steps, which skip no layer."""
    assert steps_where(make_plan(PAPER, 35, 10.0), lambda step: step.measure) == [1, 11]


def test_head_output_is_stored_every_fifth_step_and_reused_between():
    plan = make_plan(PAPER, 35, 10.0)
    assert steps_where(plan, lambda step: step.head is Head.STORE) == [5, 10, 15, 20]
    reused = [step for step in range(6, 25) if step % 5]
    assert steps_where(plan, lambda step: step.head is Head.REUSE) == reused


def test_guidance_follows_the_schedule_and_then_the_call():
    assert [step.guidance for step in make_plan(PAPER, 35, 3.0).steps] == [7.5] * 24 + [10.0] * 10
    assert {step.guidance for step in make_plan(FlashUConfig(**ALONE), 12, 3.0).steps} == {3.0}


def test_settings_that_are_off_make_the_unaccelerated_plan():
    assert make_plan(FLASHU_PRESETS["off"], 50, 7.5) == make_plan(None, 50, 7.5)


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        ({"r_p": 0.2}, {"llm"}),
        ({"r_LS": 0.2, "T_LS": 4}, {"skip", "measure"}),
        ({"T_cache": 3}, {"llm", "head"}),
        ({"schedule": [(12, 2.0)]}, {"guidance"}),
        ({"solver_order": 2}, {"order"}),
    ],
)
def test_each_technique_alone_changes_its_own_column(settings, changed):
    """The head cache's column is the head, and the LLM that a reused head does not need."""
    plan, stock = make_plan(FlashUConfig(**{**ALONE, **settings}), 12, 7.5), make_plan(None, 12, 7.5)
    different = {
        name
        for step, plain in zip(plan.steps, stock.steps, strict=True)
        for name in ("llm", "skip", "measure", "head", "guidance", "order")
        if getattr(step, name) != getattr(plain, name)
    }
    assert different == changed


SWEEP = list(itertools.product((0, 0.3), (0, 0.4), (None, 1, 3, 4), (None, 1, 2, 3, 5), (0, 3, 20), (2, 5, 20, 21)))


def test_no_plan_holds_dead_work():
    for r_p, r_LS, T_LS, T_cache, tau, steps in SWEEP:  # noqa: N806 - the paper's names
        if tau > steps:
            continue
        config = FlashUConfig(r_p=r_p, r_LS=r_LS, T_LS=T_LS, T_cache=T_cache, tau=tau, schedule=None)
        planned = make_plan(config, steps, 1.0).steps
        assert [step.number for step in planned] == list(range(1, steps))
        for index, step in enumerate(planned):
            later = planned[index + 1 :]
            if step.head is Head.REUSE:
                assert any(earlier.head is Head.STORE for earlier in planned[:index])
                assert (step.llm is Llm.NONE) == (not step.measure), "the LLM runs on a reuse step to measure only"
            else:
                assert step.llm is not Llm.NONE
            if step.measure:
                used = itertools.takewhile(lambda other: not other.measure, later)
                assert any(other.skip for other in used), "a measurement that nobody uses"
            if step.head is Head.STORE:
                assert later, "a store at the end"
                assert later[0].head is Head.REUSE, "a store that nobody reuses"
            if step.skip:
                assert any(earlier.measure for earlier in planned[:index]), "skipping before anything was measured"


def test_a_step_leans_on_the_one_before_except_first_last_and_where_guidance_changes():
    config = FlashUConfig(**{**ALONE, "schedule": [(3, 1.0), (9, 5.0)], "solver_order": 2})
    assert [step.order for step in make_plan(config, 12, 7.5).steps] == [1, 2, 2, 1, 2, 2, 2, 2, 2, 2, 1]
    assert {step.order for step in make_plan(PAPER, 35, 7.5).steps} == {1}, "the paper takes Euler steps"


@pytest.mark.parametrize("interval", [2, 3, 4])
@pytest.mark.parametrize("phases", [(3, 5, 12), (4, 1, 1, 14), (6, 7, 7), (1, 19)])
@pytest.mark.parametrize("first_scale", [1.0, 5.0])
def test_a_guided_step_reuses_what_a_guided_step_stored(interval, phases, first_scale):
    scales = itertools.cycle((first_scale, 6.0 - first_scale))
    config = FlashUConfig(r_p=0, r_LS=0, T_cache=interval, tau=2, schedule=list(zip(phases, scales, strict=False)))
    steps = make_plan(config, 20, 7.5).steps
    assert any(step.head is Head.REUSE for step in steps)
    for index, step in enumerate(steps):
        if step.head is Head.STORE:
            assert steps[index + 1].head is Head.REUSE, "a store that nobody reuses"
        if step.head is Head.REUSE:
            computed = next(other for other in reversed(steps[:index]) if other.head is not Head.REUSE)
            assert computed.head is Head.STORE
            assert computed.guided or not step.guided, "unconditional rows that nobody stored"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r_p": 1.0}, "r_p is 1.0.*below 1"),
        ({"r_p": -0.1}, "r_p is -0.1"),
        ({"r_LS": float("nan")}, "r_LS is nan"),
        ({"head_prune_ratio": 2}, "head_prune_ratio is 2"),
        ({"T_cache": 0}, "T_cache is 0.*at least 1, or None"),
        ({"T_LS": 0}, "T_LS is 0"),
        ({"T_LS": 2.5}, "T_LS is 2.5"),
        ({"tau": -1}, "tau is -1"),
        ({"tau": 36}, r"tau is 36.*num_inference_steps \(35\)"),
        ({"schedule": [(10, 7.5)], "num_inference_steps": 35}, "covers 10 steps, but 35 grid points take 34"),
        ({"schedule": []}, "schedule is empty"),
        ({"schedule": [(0, 7.5)]}, "phase of 0 steps"),
        ({"schedule": [(35, -1.0)]}, "guidance scale -1"),
        ({"schedule": 7.5}, "list of .steps, guidance scale. pairs"),
        ({"schedule": [(35, 1.0)], "adaptive_guidance_schedule": [(35, 1.0)]}, "two names for one setting"),
        ({"num_inference_steps": 1}, "num_inference_steps is 1"),
        ({"solver_order": 3}, "solver_order is 3; it is 1 .Euler. or 2"),
        ({"solver_order": 0}, "solver_order is 0"),
        ({"solver_order": True}, "solver_order is True"),
    ],
)
def test_settings_that_make_no_sense_are_refused_with_the_reason(settings, message):
    with pytest.raises(InputError, match=message):
        FlashUConfig(**settings)


def test_settings_are_checked_against_the_steps_that_are_asked_for():
    with pytest.raises(InputError, match="covers 35 steps, but 50 grid points take 49"):
        make_plan(PAPER, 50, 7.5)


def test_both_spellings_of_the_schedule_are_one_setting():
    schedule = [(4, 5.0), (8, 7.5), (20, 11.0)]
    assert FlashUConfig(schedule=schedule, tau=10) == FlashUConfig(adaptive_guidance_schedule=schedule, tau=10)
    assert FlashUConfig(schedule=schedule, tau=10).total_steps == 32
    assert FlashUConfig(T_LS=-1, T_cache=-1) == FlashUConfig(T_LS=None, T_cache=None)

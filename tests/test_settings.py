"""What a model stores beside its weights: sampling settings and levels, and how the environment overrides them."""
from __future__ import annotations

import math
import os
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tiny_refiner import EPS, PLAIN_2D, SETTINGS, designs, heads, make_refiner, measured_table, patch, two_kinds

from nnunet_pdddpm.network.checkpoint import CheckpointError
from nnunet_pdddpm.network.settings import (
    CHOICES,
    ENVIRONMENT_PREFIX,
    RANGES,
    SamplingSettings,
    as_numbers,
    environment_ignored,
    environment_overrides,
    from_numbers,
)
from nnunet_pdddpm.network.settings import KINDS as SETTING_KINDS
from nnunet_pdddpm.network.settings import override as settings_override
from nnunet_pdddpm.network.state import stored_settings, stored_table


@pytest.fixture(autouse=True)
def no_overrides(monkeypatch):
    for variable in [v for v in os.environ if v.startswith(ENVIRONMENT_PREFIX)]:
        monkeypatch.delenv(variable)


@pytest.fixture
def override(monkeypatch):
    return lambda **values: [monkeypatch.setenv(ENVIRONMENT_PREFIX + k, str(v)) for k, v in values.items()]


OTHER = SamplingSettings(start=0.123, steps=4, samples=20, samples_from='blind', start_mask='hard', redraw=0,
                         dependence=0.35, temperature=2.2, blind_temperature=0.9, mask_stock=0.25, mask_blind=0.375,
                         mask_samples=3, seed=2 ** 31 - 1)


@two_kinds
@heads
def test_settings_levels_and_weights_travel_in_the_state_dict(kind, regions):
    refiner = make_refiner(kind, settings=OTHER, regions=regions)
    cross_entropy, count = torch.rand(2, 41, generator=torch.Generator().manual_seed(1))
    refiner.store_levels(measured_table(), cross_entropy, count)
    refiner.configure(OTHER, regions)
    refiner.calibration[:2, 1] = torch.arange(6.0).reshape(2, 3)
    refiner.quality[3, 1] = torch.arange(14.0)
    fresh = make_refiner(kind, settings=SamplingSettings(), regions=not regions, seed=7)
    fresh.load_state_dict(refiner.state_dict())
    assert fresh.settings == stored_settings(fresh.state_dict()) == OTHER
    assert fresh.table == stored_table(fresh.state_dict()) == refiner.table
    assert fresh.table.log_snr == pytest.approx(measured_table().log_snr)
    assert fresh.table.share == pytest.approx(measured_table().share, abs=1e-7)
    assert torch.equal(fresh.level_cross_entropy, cross_entropy) and torch.equal(fresh.level_count, count)
    assert fresh.regions == regions and torch.equal(fresh.calibration, refiner.calibration)
    assert torch.equal(fresh.quality, refiner.quality)
    assert torch.equal(fresh(patch(kind)), refiner(patch(kind)))
    refiner.configure(OTHER, regions)
    assert not refiner.calibration.any() and not refiner.quality.any()  # they were of other settings


def test_a_table_that_is_stored_is_used_as_it_will_be_loaded():
    """Not in more digits: else a model would sample otherwise in its training than from its file."""
    refiner = make_refiner()
    refiner.store_levels(measured_table())
    before = refiner(patch(PLAIN_2D))
    assert refiner.table == stored_table(refiner.state_dict())
    refiner.load_state_dict(refiner.state_dict())
    assert torch.equal(refiner(patch(PLAIN_2D)), before)
    assert refiner.table.chain(0.8, 3) != make_refiner().table.chain(0.8, 3)


@designs
def test_a_new_model_has_the_designs_table(design):
    table = make_refiner(design=design).table
    assert len(table.share) == design.nodes
    chain = table.chain(1, 300)[:-1]
    first, last = (-math.log(1 / abar - 1) for abar in ((0.7878, 0.99996) if design is EPS else (8.3e-7, 0.981)))
    assert (chain[0], chain[-1]) == pytest.approx((first, last), abs=0.1)


@hypothesis_settings(deadline=None, derandomize=True, database=None)
@given(st.fixed_dictionaries({
    name: st.sampled_from(CHOICES[name]) if name in CHOICES else
    st.integers(*map(int, RANGES[name])) if SETTING_KINDS[name] is int else
    st.integers(math.ceil(RANGES[name][0] * 1000), int(RANGES[name][1] * 1000)).map(lambda n: n / 1000)
    for name in SETTING_KINDS}))
def test_any_settings_survive_the_models_numbers(values):
    kept = SamplingSettings(**values)
    numbers = {name: torch.tensor(n, dtype=torch.float32 if isinstance(n, float) else None).item()
               for name, n in as_numbers(kept).items()}
    assert from_numbers(numbers) == kept
    assert {name: type(value) for name, value in asdict(from_numbers(numbers)).items()} == SETTING_KINDS


OUT_OF_RANGE = [('start', 1.5), ('start', -0.25), ('steps', 0), ('steps', 1001), ('samples', 0), ('redraw', 2),
                ('dependence', 1.25), ('temperature', 0.0625), ('blind_temperature', 11.5), ('mask_stock', 1.5),
                ('mask_blind', -0.5), ('mask_samples', 0), ('seed', -1)]


@pytest.mark.parametrize('name, value', OUT_OF_RANGE)
def test_a_setting_out_of_range_is_refused_by_name(name, value):
    refiner = make_refiner()
    state = refiner.state_dict()
    state[f'setting_{name}'] = torch.tensor(value, dtype=state[f'setting_{name}'].dtype)
    with pytest.raises(ValueError, match=f"{name}={value} in the model's sampling settings is out of range"):
        make_refiner().load_state_dict(state)
    with pytest.raises(ValueError, match=f'{name}={value}.*out of range'):
        refiner.configure(replace(SETTINGS, **{name: value}), False)
    assert {name for name, _ in OUT_OF_RANGE} == RANGES.keys()


@pytest.mark.parametrize('number', [-1, 3])
def test_a_choice_that_this_version_does_not_know_is_refused_by_name(number):
    state = make_refiner().state_dict()
    state['setting_samples_from'] = torch.tensor(number)
    with pytest.raises(ValueError, match=f"samples_from={number} in the model's sampling settings is unknown"):
        make_refiner().load_state_dict(state)


@pytest.mark.parametrize(('changes', 'message'), [
    ({'samples_from': 'oracle'}, 'samples_from=oracle .* one of chain, stock, blind'),
    ({'start_mask': 'soft'}, 'start_mask=soft .* one of drawn, hard'),
    ({'mask_stock': 0.75, 'mask_blind': 0.5}, 'mask_stock=0.75 and mask_blind=0.5 .* cannot be above 1'),
    ({'start': math.nan}, 'start=nan .* must lie in 0 to 1')], ids=str)
def test_settings_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **changes).check()


def test_a_model_of_an_earlier_version_is_refused_in_one_sentence():
    refiner, kept = make_refiner(), make_refiner().state_dict()
    earlier = {name: value for name, value in kept.items() if not name.startswith(('setting_', 'level_'))}
    earlier.update(t_max=torch.tensor(960), t_start=torch.tensor(700), steps=torch.tensor(1), blend=torch.tensor(0.0))
    for state in (earlier, {name: value for name, value in kept.items() if not name.startswith('level_')},
                  {name: value for name, value in kept.items() if not name.startswith('setting_')},
                  {name: value for name, value in kept.items() if name != 'quality'},
                  {**kept, 'calibration': torch.zeros(256, 2, 7)}):
        with pytest.raises(CheckpointError, match='^The model is of another version of PDDDPMTrainer: train it '
                                                  'again with this version[.]$'):
            refiner.load_state_dict(state)


def test_a_model_with_a_setting_more_or_less_is_of_another_version():
    refiner, kept = make_refiner(), make_refiner().state_dict()
    lacking = [{key: value for key, value in kept.items() if key != f'setting_{name}'} for name in RANGES | CHOICES]
    for state in (*lacking, {**kept, 'setting_blend': torch.tensor(0.5)}):
        with pytest.raises(CheckpointError, match='^The model is of another version of PDDDPMTrainer: train it'):
            refiner.load_state_dict(state)


def test_a_table_of_levels_that_is_not_monotone_is_refused():
    for name, change, message in (('level_log_snr', lambda v: v.flip(0), 'not monotone'),
                                  ('level_share', lambda v: v.clamp(max=0.5), 'not monotone'),
                                  ('level_share', lambda v: 0.5 * v, 'from a share of 0.5 to 0, not from 1 to 0')):
        state = make_refiner().state_dict()
        state[name] = change(state[name])
        with pytest.raises(ValueError, match=f'The table of noise levels .*{message}.*Train the model again'):
            make_refiner().load_state_dict(state)


@pytest.mark.parametrize('name', ['presegmenter.decoder.seg_layers.0.weight', 'denoiser.embedding.layers.0.bias',
                                  'level_cross_entropy', 'setting_temperature'])
@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(name, value):
    state = make_refiner().state_dict()
    state[name] = state[name].clone()
    state[name].view(-1)[-1] = value
    with pytest.raises(CheckpointError, match=f'The model has NaN or infinite weights [(]{name}[)]'):
        make_refiner().load_state_dict(state)


# overrides -----------------------------------------------------------------------------------------------------------

def test_environment_overrides_what_a_loaded_model_has_stored_and_leaves_that_as_it_is(override):
    state, fresh = make_refiner().state_dict(), make_refiner(settings=SamplingSettings())
    override(start=0.5, steps=2, dependence=0.25, seed=11, presegmenter='nnUNetTrainer')
    with pytest.warns(UserWarning) as warned:
        fresh.load_state_dict(state)
        fresh.load_state_dict(state)  # said once, not for every case
    expected = replace(SETTINGS, start=0.5, steps=2, dependence=0.25, seed=11)
    assert fresh.settings == expected and stored_settings(fresh.state_dict()) == SETTINGS
    assert torch.equal(fresh(patch(PLAIN_2D)), make_refiner(settings=expected)(patch(PLAIN_2D)))
    assert [str(warning.message) for warning in warned] == [
        f'The environment overrides the sampling settings of the model: {expected}']


def test_every_setting_can_be_overridden(override):
    override(**asdict(OTHER))
    assert environment_overrides() == asdict(OTHER)
    refiner = make_refiner()
    refiner.load_state_dict(refiner.state_dict())
    assert refiner.settings == OTHER


def test_where_the_environment_is_ignored_a_model_has_its_own_settings_even_if_both_do_not_go_together(override):
    override(mask_stock=0.5, start=0.1)  # and 0.75 of the blind mask is stored
    refiner, fresh = make_refiner(settings=replace(SETTINGS, mask_stock=0, mask_blind=0.75)), make_refiner()
    with environment_ignored():
        fresh.load_state_dict(refiner.state_dict())
    assert fresh.settings == refiner.settings
    with pytest.raises(ValueError, match='mask_stock=0.5 and mask_blind=0.75'):
        fresh.load_state_dict(refiner.state_dict())


def test_variables_in_upper_case_as_on_windows_count_and_empty_ones_do_not(monkeypatch):
    monkeypatch.setenv('NNUNET_PDDDPM_SAMPLES_FROM', 'stock')
    monkeypatch.setenv('nnUNet_pdddpm_steps', '')
    assert environment_overrides() == {'samples_from': 'stock'}


@pytest.mark.parametrize(('changes', 'expected'), [
    ({'start': 0}, lambda refiner, image: refiner.presegmenter(image)),
    ({'mask_stock': 1, 'mask_blind': 0}, lambda refiner, image: refiner.presegmenter(image)),
    ({'mask_blind': 1}, lambda refiner, image: refiner.blind_logits(image))], ids=['start', 'stock', 'blind'])
def test_the_environment_turns_sampling_off(override, changes, expected):
    refiner, image = make_refiner(), patch(PLAIN_2D)
    override(**changes)
    refiner.load_state_dict(refiner.state_dict())
    with torch.no_grad():
        assert torch.equal(refiner(image), expected(refiner, image))


def test_a_start_or_steps_ask_for_a_chain_where_the_model_has_none():
    stored = replace(SETTINGS, samples_from='stock')
    for overrides, source in (({'start': 0.5}, 'chain'), ({'steps': 2}, 'chain'), ({'samples': 3}, 'stock'),
                              ({'start': 0.5, 'samples_from': 'blind'}, 'blind')):
        assert settings_override(stored, overrides, 'flags') == replace(stored, **{**overrides, 'samples_from': source})


@pytest.mark.parametrize('values, message', [
    ({'steps': 'abc'}, 'nnUNet_pdddpm_steps must be a whole number, got "abc"'),
    ({'steps': '1.5'}, 'nnUNet_pdddpm_steps must be a whole number, got "1.5"'),
    ({'redraw': 'yes'}, 'nnUNet_pdddpm_redraw must be a whole number, got "yes"'),
    ({'start': 'half'}, 'nnUNet_pdddpm_start must be a number, got "half"'),
    ({'start_mask': 'soft'}, 'start_mask=soft in the environment variables .* one of drawn, hard'),
    ({'samples_from': '1'}, 'samples_from=1 in the environment variables .* one of chain, stock, blind'),
    ({'mask_stock': 0.5, 'mask_blind': 0.75}, 'mask_stock=0.5 and mask_blind=0.75 in the environment'),
    ({'temperature': 'nan'}, 'temperature=nan in the environment .* 0.1 to 10'),
    ({'t_start': 10}, 'nnUNet_pdddpm_t_start is unknown; the known ones are .*nnUNet_pdddpm_start'),
    *[({name: value}, f'{name}={value} in the environment .* is out of range') for name, value in OUT_OF_RANGE],
], ids=str)
def test_a_wrong_override_is_refused_by_name_and_value(override, values, message):
    refiner = make_refiner()
    override(**values)
    with pytest.raises(ValueError, match=message) as error:
        refiner.load_state_dict(refiner.state_dict())
    assert '\n' not in str(error.value)

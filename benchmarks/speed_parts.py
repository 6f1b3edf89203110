"""What `speed.py` measures within one process: network calls and what comes on top, cost against the settings, a
profile, training iterations. Medians and ranges of interleaved repeats."""
from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from nnunet_pdddpm.inference import volume
from nnunet_pdddpm.inference.predictor import PDDDPMPredictor
from nnunet_pdddpm.network.settings import SamplingSettings


def spread(values: list[float], digits: int = 2) -> str:
    """Median and range."""
    return f'{np.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})'


def timed(device: torch.device, do: Callable[[], Any]) -> float:
    """Seconds, until the device is done."""
    synchronise = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
    synchronise()
    start = time.perf_counter()
    do()
    synchronise()
    return time.perf_counter() - start


def interleaved(device: torch.device, what: Mapping[Any, Callable[[], Any]], repeats: int) -> dict[Any, list[float]]:
    """Seconds of each, one after the other, again and again; a first round is not counted."""
    seconds: dict[Any, list[float]] = {name: [] for name in what}
    for repeat in range(repeats + 1):
        for name, do in what.items():
            measured = timed(device, do)
            if repeat:
                seconds[name].append(measured)
    return seconds


def opened(model: Path, device: str, **settings: Any) -> PDDDPMPredictor:
    """A predictor with fold 0 of a model; `settings` as `PDDDPMPredictor` takes them."""
    predictor = PDDDPMPredictor(device=torch.device(device), allow_tqdm=False, **settings)
    predictor.initialize_from_trained_model_folder(str(model), (0,))
    return predictor


def with_samples(predictor: PDDDPMPredictor, **changes: Any) -> SamplingSettings:
    """The model's settings with some changed, and the mask made of the samples."""
    return replace(predictor.fold_settings[0], samples_from='chain', mask_stock=0.0, mask_blind=0.0, **changes)


def preprocessed(predictor: PDDDPMPredictor, images: Path, cases: int) -> list[Tensor]:
    """The first images of a folder, each (channels, Z, Y, X)."""
    ending, preprocessor = predictor.dataset_json['file_ending'], predictor.configuration_manager.preprocessor_class()
    names = sorted({file.name[:-len(f'_0000{ending}')] for file in images.iterdir()})[:cases]
    return [torch.from_numpy(preprocessor.run_case(
        sorted(str(file) for file in images.glob(f'{name}_*{ending}')), None, predictor.plans_manager,
        predictor.configuration_manager, predictor.dataset_json)[0]).float() for name in names]


@torch.inference_mode()
def seconds_a_call(predictor: PDDDPMPredictor, repeats: int = 7) -> dict[str, list[float]]:
    """Seconds of a forward pass over a tile: stock network, denoiser as it is called, denoiser in float32."""
    refiner, device = predictor.refiner.to(predictor.device).eval(), predictor.device
    patch = predictor.configuration_manager.patch_size
    image = torch.randn((1, len(predictor.dataset_json['channel_names']), *patch), device=device)
    noisy = torch.randn((1, refiner.num_channels, *patch), device=device)
    level = torch.tensor([700], device=device)

    def stock() -> None:
        with torch.autocast('cuda', enabled=device.type == 'cuda'):
            refiner.presegmenter(image)

    def denoiser() -> None:
        with predictor.autocast():
            refiner.denoiser(image, noisy, level)
    threads = torch.get_num_threads()
    return interleaved(device, {'stock': stock, 'denoiser': denoiser,
                                'denoiser in float32': lambda: refiner.denoiser(image, noisy, level)}, repeats) | {
        'threads': [threads]}


@torch.inference_mode()
def ways_to_call(predictor: PDDDPMPredictor, repeats: int) -> dict[str, list[float]]:
    """Seconds a tile of the denoiser, several tiles at a time, with channels last, and compiled."""
    patch, denoiser = predictor.configuration_manager.patch_size, predictor.refiner.to(predictor.device).eval().denoiser
    channels_last = copy.deepcopy(denoiser).to(memory_format=torch.channels_last_3d)
    compiled = torch.compile(copy.deepcopy(denoiser))

    def call(network: Any, tiles: int) -> None:
        image = torch.randn((tiles, len(predictor.dataset_json['channel_names']), *patch), device=predictor.device)
        noisy = torch.randn((tiles, predictor.refiner.num_channels, *patch), device=predictor.device)
        with predictor.autocast():
            network(image, noisy, torch.full((tiles,), 700, device=predictor.device))
    what = {f'{tiles} at a time': (denoiser, tiles) for tiles in (1, 2, 4, 8)}
    what |= {'channels last': (channels_last, 1), 'compiled': (compiled, 1)}
    seconds = interleaved(predictor.device, {name: (lambda one=one: call(*one)) for name, one in what.items()}, repeats)
    return {name: [value / what[name][1] for value in values] for name, values in seconds.items()}


def overhead(predictor: PDDDPMPredictor, image: Tensor, repeats: int) -> dict[str, Any]:
    """Seconds of the network part of an image beside those of its calls alone."""
    calls: dict[str, int] = {}

    def predict() -> None:
        prediction = predictor.predict_volume(image, lambda number, logits: None)
        calls.update(prediction.network_calls)
    seconds, per_call = [], []
    for _ in range(repeats):
        seconds.append(timed(predictor.device, predict))
        one = seconds_a_call(predictor, 3)
        per_call.append(sum(calls[of] * float(np.median(one[of])) for of in ('stock', 'denoiser')))
    return {'calls': calls, 'seconds': seconds, 'of calls': per_call,
            'ratio': [a / b for a, b in zip(seconds, per_call, strict=True)]}


def enlarged(image: Tensor, times: int) -> Tensor:
    """An image of so many times the voxels (1, 2, 4 or 8): itself and mirror images of it beside one another."""
    for axis in range(1, int(np.log2(times)) + 1):
        image = torch.cat([image, image.flip(axis)], axis)
    return image


def cost_of_settings(predictor: PDDDPMPredictor, image: Tensor, repeats: int) -> dict[str, list[float]]:
    """Seconds of the network part with other numbers of samples, steps, and other sizes; the stock model's beside."""
    before = predictor.fold_settings, predictor.num_samples
    chosen = {f'n = {n}, k = {k}': (n, k, 1) for n, k in ((1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (8, 2), (8, 3),
                                                         (8, 5), (8, 10))}
    chosen |= {f'n = 8, k = 1, {times} x the voxels': (8, 1, times) for times in (2, 4, 8)}

    def predict(n: int, k: int, times: int) -> None:
        predictor.fold_settings, predictor.num_samples = [with_samples(predictor, samples=n, steps=k)], n
        predictor.predict_volume(enlarged(image, times))

    def stock(times: int) -> None:
        with predictor.presegmenting():
            predictor.predict_sliding_window_return_logits(enlarged(image, times))
    what: dict[str, Callable[[], Any]] = {'stock': lambda: stock(1)}
    what |= {f'stock, {times} x the voxels': (lambda times=times: stock(times)) for times in (2, 4, 8)}
    what |= {name: (lambda values=values: predict(*values)) for name, values in chosen.items()}
    try:
        return interleaved(predictor.device, what, repeats)
    finally:
        predictor.fold_settings, predictor.num_samples = before


def cost_of_share(predictor: PDDDPMPredictor, image: Tensor, repeats: int) -> dict[str, list[float]]:
    """Seconds of the network part of a large image when only a share of nnU-Net's tiles is denoised."""
    large = enlarged(image, 4)
    choose = volume.tiles_around

    def predict(share: float) -> None:
        def some(unsure: Tensor, patch_size: Any, tile: Callable[..., Any]) -> list[Any]:
            tiles = tile(tuple(unsure.shape))
            return tiles[:round(share * len(tiles))]
        volume.tiles_around = some
        try:
            predictor.predict_volume(large)
        finally:
            volume.tiles_around = choose

    def stock() -> None:
        with predictor.presegmenting():
            predictor.predict_sliding_window_return_logits(large)
    return interleaved(predictor.device, {'stock': stock, **{str(share): (lambda share=share: predict(share))
                                                             for share in (1.0, 0.5, 0.25, 0.0)}}, repeats)


def top_costs(predictor: PDDDPMPredictor, image: Tensor, rows: int = 10) -> list[tuple[str, float]]:
    """The operators that take most of the time of an image's network part, and their shares of it."""
    on_cuda = predictor.device.type == 'cuda'
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities) as profiled:
        predictor.predict_volume(image, lambda number, logits: None)
    attribute = 'self_device_time_total' if on_cuda else 'self_cpu_time_total'
    costs = {event.key: getattr(event, attribute) for event in profiled.key_averages()}
    total = sum(costs.values())
    return [(name, cost / total) for name, cost in sorted(costs.items(), key=lambda item: -item[1])[:rows]]


def training_iterations(trainers: Mapping[str, Any], repeats: int) -> dict[str, list[float]]:
    """Seconds of an iteration of initialised trainers, each on batches of its own loader, which are drawn before."""
    batches = {}
    for name, trainer in trainers.items():
        loader, _ = trainer.get_dataloaders()
        batches[name] = [next(loader) for _ in range(repeats + 1)]
        trainer.on_train_epoch_start()
    left = {name: iter(of_trainer) for name, of_trainer in batches.items()}
    some = next(iter(trainers.values()))
    return interleaved(some.device, {name: (lambda name=name: trainers[name].train_step(next(left[name])))
                                     for name in trainers}, repeats)

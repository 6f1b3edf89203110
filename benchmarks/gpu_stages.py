"""The stages of `gpu.py` that measure: prediction, iterations of training, trainings on the hippocampus."""
from __future__ import annotations

import copy
import json
import os
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benchmark_trainers import PDDDPMTrainerGPU, PDDDPMTrainerGPUSecond, nnUNetTrainerGPU, nnUNetTrainerGPULonger
from datasets import hippocampus as benchmark
from gpu_run import Run
from machine import PLANS, timed
from nnunet import MEAN_OF_SAMPLES, find_data
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from speed_synthetic import synthetic_plans
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn.functional import interpolate
from torch.profiler import ProfilerActivity, profile

from nnunet_pdddpm.demo.phantom import write_dataset
from nnunet_pdddpm.file_names import FINAL_CHECKPOINT
from nnunet_pdddpm.inference.volume_predictor import VolumePredictor
from nnunet_pdddpm.network.refiner import Refiner
from nnunet_pdddpm.network.settings import PRESEGMENTER_VARIABLE, SamplingSettings
from nnunet_pdddpm.training.trainer import PDDDPMTrainer

HIPPOCAMPUS = replace(benchmark.HIPPOCAMPUS, family='GPU')
CONFIGURATION = HIPPOCAMPUS.configuration
NETWORKS: dict[type, str] = {nnUNetTrainerGPU: 'stock', nnUNetTrainerGPULonger: 'longer', PDDDPMTrainerGPU: 'denoiser',
                             PDDDPMTrainerGPUSecond: 'second'}


class Size(NamedTuple):
    """Of networks and volumes, and how long is measured."""
    classes: tuple[int, ...]
    patch: tuple[int, int, int]
    volume: tuple[int, int, int]
    features: tuple[int, ...]
    batch: int
    seconds: float
    """That repeats of one measurement take, once the first is done."""
    eager_limit: float
    compiled_limit: float
    """Seconds after which a cell is given up."""
    epochs: int
    """Of a training."""
    most_iterations: int


FULL = Size((25, 117, 2), (128,) * 3, (192,) * 3, (32, 64, 128, 256, 320, 320), 2, 5, 60, 90, 10, 10 ** 6)
TINY = Size((2, 3), (8, 16, 8), (8, 16, 8), (4, 8, 8), 2, 0, 300, 300, 2, 4)


def size_of(run: Run) -> Size:
    """Full, or of a dry run."""
    return TINY if run.tiny else FULL


def synthetic(size: Size, classes: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Plans as nnU-Net makes them for isotropic images of one channel, and the dataset.json."""
    return synthetic_plans(classes, size.patch, size.features, size.batch)


# prediction ----------------------------------------------------------------------------------------------------------

@lru_cache(maxsize=1)
def networks(size: Size, classes: int, compiled: bool) -> tuple[Refiner, dict[str, Tensor]]:
    """A refiner with random weights, and its weights as a checkpoint has them."""
    torch._dynamo.reset()  # else the networks before this one count among its recompilations
    torch.manual_seed(0)
    plans = PlansManager(synthetic(size, classes)[0])
    refiner = PDDDPMTrainer.build_network_architecture(plans, plans.get_configuration(CONFIGURATION), 1, classes, False)
    refiner.configure(SamplingSettings(), False)
    refiner.eval()
    weights = refiner.state_dict()
    if compiled:
        for network in (refiner.presegmenter, refiner.denoiser):
            network.compile(**compiler(size))
    return refiner, weights


def compiler(size: Size) -> dict[str, Any]:
    """Of torch.compile: a dry run needs none."""
    return {'backend': 'eager'} if size == TINY else {}


def opened(run: Run, classes: int, kind: type, network: Any, weights: dict[str, Tensor]) -> Any:
    """A predictor with a network that no file holds, with mirroring."""
    plans, description = synthetic(size_of(run), classes)
    predictor, manager = kind(device=run.device, allow_tqdm=False), PlansManager(plans)
    nnUNetPredictor.manual_initialization(predictor, network, manager, manager.get_configuration(CONFIGURATION),
                                          [weights], description, 'PDDDPMTrainer', (0, 1, 2))
    return predictor


def stock(run: Run, classes: int, compiled: bool) -> Callable[[Tensor], Any]:
    """What `nnUNetv2_predict` does with the stock model, whose weights are not frozen: autocast converts them once."""
    refiner, weights = networks(size_of(run), classes, compiled)
    network = copy.deepcopy(refiner.presegmenter).requires_grad_()
    if compiled:
        network.compile(**compiler(size_of(run)))
    prefix = 'presegmenter.'
    return opened(run, classes, nnUNetPredictor, network,
                  {name[len(prefix):]: of for name, of in weights.items() if name.startswith(prefix)}
                  ).predict_logits_from_preprocessed_data


def plain(run: Run, classes: int, compiled: bool) -> Callable[[Tensor], Any]:
    """What `nnUNetv2_predict` does with a PDDDPM model: the blind mask."""
    return opened(run, classes, nnUNetPredictor, *networks(size_of(run), classes, compiled)
                  ).predict_logits_from_preprocessed_data


def samples(run: Run, classes: int, compiled: bool, **settings: Any) -> Callable[[Tensor], Any]:
    """What `nnUNetv2_pdddpm_predict --uncertainty` does: 8 samples, their maps, and a mask."""
    predictor = opened(run, classes, VolumePredictor, *networks(size_of(run), classes, compiled))
    predictor.fold_settings, predictor.num_samples = [SamplingSettings(samples=8, **settings)], 8

    def predict(image: Tensor) -> Any:
        prediction = predictor.predict_volume(image, stock=False)
        return prediction, {name: of.cpu() for name, of in prediction.spread.maps().items()}
    return predict


METHODS: dict[str, Callable[[Run, int, bool], Callable[[Tensor], Any]]] = {
    'samples': samples, 'stock': stock, 'plain': plain,
    'of_samples': lambda run, classes, compiled: samples(run, classes, compiled, **MEAN_OF_SAMPLES)}


def peak(device: torch.device) -> float | None:
    """GiB allocated at most since it was asked last, on a GPU."""
    if device.type != 'cuda':
        return None
    most = torch.cuda.max_memory_allocated() / 2 ** 30
    torch.cuda.reset_peak_memory_stats()
    return round(most, 3)


def repeated(run: Run, do: Callable[[], Any], most: int) -> dict[str, Any]:
    """Seconds of the first call and of at most so many others, and peak memory of these."""
    size, first = size_of(run), timed(run.device, do)
    peak(run.device)
    seconds = [timed(run.device, do)]
    while len(seconds) < most and sum(seconds) < size.seconds:
        seconds.append(timed(run.device, do))
    return {'first': round(first, 3), 'seconds': [round(s, 4) for s in seconds], 'GiB': peak(run.device)}


def profiled(run: Run, do: Callable[[], Any]) -> dict[str, Any]:
    """Kernels launched (on a CPU: operators called), and the ten that take longest, with their share of the time."""
    on_gpu = run.device.type == 'cuda'
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as record:
        timed(run.device, do)
    events = record.key_averages()
    if on_gpu:  # kernels, whose names tell the operator: what torch.compile makes belongs to no operator
        launches = sum(event.count for event in events if 'LaunchKernel' in event.key)
        events = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
        costs = {event.key: event.self_device_time_total for event in events}
    else:
        launches = sum(event.count for event in events)
        costs = {event.key: event.self_cpu_time_total for event in events}
    top, total = sorted(costs.items(), key=lambda item: -item[1])[:10], sum(costs.values())
    return {'launches': launches, 'top': [[name[:70], round(cost / max(total, 1e-9), 4)] for name, cost in top]}


def speed(run: Run) -> None:
    """Prediction and iterations of training, as they are; then compiled, which takes most of the time."""
    for compiled in (False, True):
        prediction(run, compiled)
        iterations(run, compiled)


def prediction(run: Run, compiled: bool) -> None:
    """A cell for each number of classes and method to predict a volume of noise."""
    size = size_of(run)

    def measure(classes: int, method: str) -> dict[str, Any]:
        predict = METHODS[method](run, classes, compiled)
        volume = torch.randn((1, *size.volume), generator=torch.Generator().manual_seed(0))
        result = repeated(run, lambda: predict(volume), 5)
        patch = volume[(slice(None), *(slice(n) for n in size.patch))]
        predict(patch)
        return {**result, **run.attempt(lambda: profiled(run, lambda: predict(patch)))}
    for classes in size.classes[:1] if run.tiny and compiled else size.classes:
        for method in METHODS:
            run.cell(f'speed_{classes:03d}_{"compiled" if compiled else "eager"}_{method}',
                     size.compiled_limit if compiled else size.eager_limit, lambda c=classes, w=method: measure(c, w))
    networks.cache_clear()


# iterations of training ----------------------------------------------------------------------------------------------

def bare_trainer(run: Run, kind: type, classes: int, compiled: bool) -> Any:
    """A trainer of synthetic plans, initialised, without data. That of PDDDPM has an untrained stock model."""
    size = size_of(run)
    plans, description = synthetic(size, classes)
    folder = Path(os.environ['nnUNet_preprocessed']) / plans['dataset_name'] / 'synthetic'
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'none.b2nd').touch()  # by whose ending nnU-Net knows the format
    os.environ['nnUNet_compile'] = str(compiled)
    trainer = kind({**plans, 'continue_training': False}, CONFIGURATION, 0, description, run.device)
    if isinstance(trainer, PDDDPMTrainer):
        untrained = bare_trainer(run, nnUNetTrainer, classes, False)
        untrained.save_checkpoint(str(Path(untrained.output_folder) / FINAL_CHECKPOINT))
        del untrained  # its memory is not PDDDPM's
        os.environ['nnUNet_compile'] = str(compiled)
    trainer.initialize()
    return trainer


def synthetic_batch(trainer: Any, classes: int) -> dict[str, Any]:
    """Noise, and labels in blocks, at the scales of deep supervision."""
    shape = trainer.configuration_manager.patch_size
    blocks = torch.randint(0, classes, (trainer.batch_size, 1, *(max(1, n // 16) for n in shape)))
    labels = interpolate(blocks.float(), tuple(shape))
    targets = [interpolate(labels, [round(n * s) for n, s in zip(shape, scale, strict=True)]).short()
               for scale in trainer._get_deep_supervision_scales()]
    return {'data': torch.randn(labels.shape), 'target': targets, 'keys': ['synthetic'] * trainer.batch_size}


def iterations(run: Run, compiled: bool) -> None:
    """A cell for each number of classes and trainer: seconds of a training step and memory, without data loading."""
    size, kinds = size_of(run), {'stock': nnUNetTrainer, 'PDDDPM': PDDDPMTrainer}
    os.environ[PRESEGMENTER_VARIABLE] = nnUNetTrainer.__name__

    def measure(classes: int, kind: type) -> dict[str, Any]:
        trainer = bare_trainer(run, kind, classes, compiled)
        torch._dynamo.reset()
        batch = synthetic_batch(trainer, classes)
        trainer.on_train_epoch_start()
        warm = 1 if run.tiny else 4
        first = sum(timed(run.device, lambda: trainer.train_step(batch)) for _ in range(warm))
        return {**repeated(run, lambda: trainer.train_step(batch), 30), 'first': round(first, 2)}
    for classes in size.classes:
        for name, kind in kinds.items():
            run.cell(f'iterations_{classes:03d}_{"compiled" if compiled else "eager"}_{name}',
                     size.compiled_limit if compiled else size.eager_limit, lambda c=classes, t=kind: measure(c, t))
    os.environ['nnUNet_compile'] = 'false'


# hippocampus ---------------------------------------------------------------------------------------------------------

ROWS: dict[str, tuple[type, dict[str, Any]]] = {
    'stock': (nnUNetTrainerGPU, {}), 'blind': (PDDDPMTrainerGPU, {}), 'samples': (PDDDPMTrainerGPU, MEAN_OF_SAMPLES),
    'longer': (nnUNetTrainerGPULonger, {}), 'second': (PDDDPMTrainerGPUSecond, {'samples': 1})}


def hippocampus(run: Run) -> None:
    """Train stock, then PDDDPM, control and second network equally long, and score each: a cell a row."""
    os.environ[PRESEGMENTER_VARIABLE] = nnUNetTrainerGPU.__name__
    for row, (kind, settings) in ROWS.items():
        plan = f'plan_{"stock" if row == "stock" else "further"}'
        run.cell(plan, 60, lambda r=row: planned(run, r))
        if 'iterations' in run.cells.get(plan, {}):
            run.cell(f'hippocampus_{row}', run.left + 30, lambda k=kind, s=settings, n=run.cells[plan]['iterations']:
                     trained_and_scored(run, k, s, n))


def prepare(run: Run) -> None:
    """Test cases split off, planned and preprocessed. Of a dry run: made up, with smaller plans."""
    if not run.tiny:
        return benchmark.prepare(run.work, find_data(run.data, HIPPOCAMPUS.title, 'dataset.json'), dataset=HIPPOCAMPUS)
    size, source = size_of(run), run.work / 'made_up' / HIPPOCAMPUS.title
    if not (source / 'dataset.json').is_file():
        write_dataset(source, num_training=6, num_test=0, shape=(16, 20, 18))
    benchmark.prepare(run.work, source, num_test=2, dataset=HIPPOCAMPUS)
    file = HIPPOCAMPUS.preprocessed(run.work) / f'{PLANS}.json'
    plans, small = json.loads(file.read_text()), synthetic(size, 3)[0]['configurations'][CONFIGURATION]
    plans['configurations'][CONFIGURATION].update({name: small[name] for name in ('architecture', 'patch_size')})
    file.write_text(json.dumps(plans))


def make_trainer(run: Run, kind: type, iterations: int) -> Any:
    """A trainer of the fold, for so many iterations."""
    folder = HIPPOCAMPUS.preprocessed(run.work)
    plans, description = (json.loads((folder / f'{name}.json').read_text()) for name in (PLANS, 'dataset'))
    trainer: Any = kind({**plans, 'continue_training': False}, CONFIGURATION, 0, description, run.device)
    trainer.num_epochs = size_of(run).epochs
    trainer.num_iterations_per_epoch = max(1, iterations // trainer.num_epochs)
    return trainer


def planned(run: Run, row: str) -> dict[str, Any]:
    """Iterations of the stock model, which may take 30 % of the time; or of each of the other three, in what is left
    then. Predictions, and the beginnings and ends of trainings, take the rest."""
    if row == 'stock':
        share, of_each = 0.3, seconds_an_iteration(run, nnUNetTrainerGPU)
        of_all = of_each
    else:
        share, of_each = 0.65, seconds_an_iteration(run, PDDDPMTrainerGPU)
        of_all = run.cells['plan_stock']['an_iteration'] + 2 * of_each
    epochs, most = size_of(run).epochs, size_of(run).most_iterations
    return {'an_iteration': of_each, 'iterations': max(1, min(int(share * run.left / of_all), most) // epochs) * epochs}


def seconds_an_iteration(run: Run, kind: type) -> float:
    """Mean, data loading included, without the first ones: batches are loaded before them, cuDNN tries algorithms."""
    trainer = make_trainer(run, kind, 1)
    trainer.initialize()
    trainer.dataloader_train, trainer.dataloader_val = trainer.get_dataloaders()
    try:
        trainer.on_train_epoch_start()

        def iteration() -> None:
            trainer.train_step(next(trainer.dataloader_train))
        seconds = [timed(run.device, iteration) for _ in range(2 if run.tiny else 40)]
        return statistics.mean(seconds[len(seconds) // 4:])
    finally:
        for loader in (trainer.dataloader_train, trainer.dataloader_val):  # end the processes that load data
            if hasattr(loader, '_finish'):
                loader._finish()


def trained_and_scored(run: Run, kind: type, settings: dict[str, Any], iterations: int
                       ) -> dict[str, Any]:
    """Train it to its end, unless that is done, and score the test cases."""
    final = HIPPOCAMPUS.checkpoint(run.work, NETWORKS[kind], 0)
    if not final.is_file():
        make_trainer(run, kind, iterations).run_training()
    return {'iterations': iterations, 'checkpoint_MB': round(final.stat().st_size / 1e6, 1),
            **scored(run, kind, settings)}


@torch.inference_mode()
def scored(run: Run, kind: type, settings: dict[str, Any]) -> dict[str, Any]:
    """Dice and NLL of every test case, with mirroring, and the seconds of the network part."""
    from volumes import cases, score
    refined = issubclass(kind, PDDDPMTrainer)
    predictor = HIPPOCAMPUS.open(run.work, NETWORKS[kind], [0], VolumePredictor if refined else nnUNetPredictor,
                                 **({'overrides': settings} if refined else {}))
    result: dict[str, list[float]] = {'dice': [], 'nll': [], 'seconds': []}
    predicted: list[Tensor] = []
    run.cases = run.cases or list(cases(predictor, run.work, 'Ts', benchmark.names(run.work)))
    for _, image, truth in run.cases:
        seconds = timed(run.device, lambda image=image: predicted.append(
            predictor.predict_logits_from_preprocessed_data(image)))
        case_estimates = {**score(truth, predicted.pop().float()), 'seconds': seconds}
        for name in result:
            result[name].append(round(case_estimates[name], 5))
    return result

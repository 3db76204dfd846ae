"""The time of loading an image, and images per second of the loader."""

import time
from itertools import islice

import torch
from detectron2.config import CfgNode
from detectron2.data import detection_utils, get_detection_dataset_dicts
from detectron2.data.transforms import AugInput

from atss.data.mapper import Mapper
from atss.engine import Trainer

from .timing import Stopwatch, parts_in_turn, table

CPU = torch.device("cpu")


def loading(cfg: CfgNode, images: int, workers: tuple[int, ...]) -> dict:
    """Measure milliseconds per image by part, and images per second by number of workers."""
    records = get_detection_dataset_dicts(cfg.DATASETS.TRAIN)[:images]
    mapper = Mapper(cfg, is_train=True)

    def parts(watch: Stopwatch, record: dict) -> None:
        image = detection_utils.read_image(record["file_name"], cfg.INPUT.FORMAT)
        watch.lap("decoding the file")
        mapper.augmentations(AugInput(image))
        watch.lap("augmentation")
        mapper(record)
        watch.lap("all, by the mapper")

    laps = [parts_in_turn(lambda w, r=r: parts(w, r), 1, CPU) for r in records]
    mean = {k: sum(x[k].median for x in laps) / len(laps) * 1e3 for k in laps[0]}
    mean["all else"] = mean["all, by the mapper"] - mean["decoding the file"] - mean["augmentation"]
    print(table(["part", "ms per image"], [[k, f"{v:.1f}"] for k, v in mean.items()]))

    rates = {}
    for number in workers:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = number
        cfg.SEED = 0
        batches = iter(Trainer.build_train_loader(cfg))
        for _ in islice(batches, 2 + number):  # workers start and fill their queues
            pass
        count = max(images // cfg.SOLVER.IMS_PER_BATCH, 1)
        start = time.perf_counter()
        for _ in islice(batches, count):
            pass
        rates[number] = count * cfg.SOLVER.IMS_PER_BATCH / (time.perf_counter() - start)
    print(table(["workers", "images/s"], [[k, f"{v:.1f}"] for k, v in rates.items()]))
    return {"ms per image": mean, "images per second by workers": rates}

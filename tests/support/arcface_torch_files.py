"""Folders as arcface_torch leaves them, written by a training of its algorithm on one process.

torch.optim.SGD or AdamW with the backbone's parameters and the matrix of all centers, cut for
``ranks`` at the end: what its ranks hold, without its NCCL.
"""

import math

import torch
import torch.nn.functional as F

from partialfc.backbones import build_backbone

SIZE, DIM, SCALE, ANGULAR = 32, 64, 64.0, 0.5


def loss_of(backbone, centers, images, identities, ranks):
    """ArcFace as they compute it: the margin is a constant in backward, BatchNorm is a rank's."""
    embeddings = torch.cat([backbone(part) for part in images.chunk(ranks)])
    cosine = F.normalize(embeddings) @ F.normalize(centers).T
    cosine = cosine.clamp(-1, 1)
    own = F.one_hot(identities, len(centers)).bool()
    with torch.no_grad():
        offset = torch.where(own, (cosine.acos() + ANGULAR).cos() - cosine, 0.0)
    return F.cross_entropy(SCALE * (cosine + offset), identities)


def cut(matrix, rank, ranks):
    each, more = divmod(len(matrix), ranks)
    start = each * rank + min(rank, more)
    return matrix[start : start + each + (rank < more)].clone()


class Training:
    """Some steps of their training on given batches; ``centers`` are all of them."""

    def __init__(self, identities, *, network="convnet_s", optimizer="sgd"):
        torch.manual_seed(1)
        self.backbone = build_backbone(network, embedding_dim=DIM, image_size=SIZE)
        self.centers = torch.nn.Parameter(torch.normal(0, 0.01, (identities, DIM)))
        groups = [{"params": list(self.backbone.parameters())}, {"params": [self.centers]}]
        self.optimizer = (
            torch.optim.SGD(groups, lr=0.02, momentum=0.9, weight_decay=5e-4)
            if optimizer == "sgd"
            else torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1)
        )
        self.step = 0

    def take(self, batches, total_steps, lr, ranks=1):
        losses = []
        for images, identities in batches:
            for group in self.optimizer.param_groups:
                group["lr"] = lr * (1 - self.step / total_steps)
            loss = loss_of(self.backbone, self.centers, images, identities, ranks)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.backbone.parameters(), 5)
            self.optimizer.step()
            self.step += 1
            losses.append(float(loss.detach()))
        return losses

    def save(self, folder, layout, ranks):
        folder.mkdir(parents=True, exist_ok=True)
        backbone = self.backbone.state_dict()
        last = len(self.optimizer.param_groups[0]["params"])
        state = self.optimizer.state_dict()["state"]
        weights = [cut(self.centers.detach(), rank, ranks) for rank in range(ranks)]
        for rank, weight in enumerate(weights):
            own = {
                name: cut(value, rank, ranks) if value.ndim else value
                for name, value in state[last].items()
            }
            if layout == "checkpoint":
                optimizer = self.optimizer.state_dict()
                optimizer["state"] = {**state, last: own}
                content = {
                    "epoch": 1,
                    "global_step": self.step,
                    "state_dict_backbone": backbone,
                    "state_dict_softmax_fc": {"weight": weight},
                    "state_optimizer": optimizer,
                    "state_lr_scheduler": {"last_epoch": self.step, "base_lrs_init": [0.02, 0.02]},
                }
                torch.save(content, folder / f"checkpoint_gpu_{rank}.pt")
            if layout == "softmax_fc":
                torch.save({"weight": weight}, folder / f"softmax_fc_gpu_{rank}.pt")
            if layout == "rank":
                name = f"rank{':' if ranks > 4 else '_'}{rank}_softmax_weight"
                torch.save(weight, folder / f"{name}.pt")
                torch.save(own["momentum_buffer"], folder / f"{name}_mom.pt")
        name = "backbone.pth" if layout == "rank" else "model.pt"
        torch.save(backbone, folder / name, _use_new_zipfile_serialization=layout != "rank")


SETTINGS = f"""
from easydict import EasyDict as edict

config = edict()
config.margin_list = (1.0, {ANGULAR}, 0.0)
config.network = "mbf"
config.resume = False
config.output = None
config.embedding_size = {DIM}
config.sample_rate = 1.0
config.fp16 = False
config.momentum = 0.9
config.weight_decay = 5e-4
config.batch_size = 8
config.lr = 0.02
config.verbose = 2000
config.dali = False
config.rec = "REC"
config.num_classes = 40
config.num_image = {math.prod((40, 6))}
config.num_epoch = 2
config.warmup_epoch = 0
config.val_targets = []
"""

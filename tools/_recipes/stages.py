"""Recipes in stages: what they are called, and their settings files."""

_LVFACE = """\
# WebFace42M, ViT-L in three stages, as LVFace (https://arxiv.org/abs/2501.13420): a tenth of the
# negatives while embeddings find their places, then a penalty that keeps the classes together, then
# all negatives. Ours: not measured.
#
# Theirs are rate, margin, optimizer and batches: 384 images a GPU of 64 for 60 epochs, then 128.
# The penalty is losses.center, the pull to the own class center; theirs is a second softmax against
# the mean embedding of every identity. They end a stage when the mean squared cosine to the own
# center comes to 0.2 and 0.35; the epochs here, and the weight, are a starting point. The learning
# rate falls in one line over all three, and is divided by three where the batch is.
#
{commands}

[run]
folder = "runs/wf42m_lvface"

[data]
train = "~/data/WebFace42M/train.rec"
global_batch = 24576

[backbone]
name = "vit_l"

[backbone.options]
masked = 0.1
drop_path = 0.05

[head]
sample_rate = 0.1

[head.margin]
name = "cosface"
scale = 64
additive = 0.4

[head.optimizer]
name = "adamw"
weight_decay = 0.1

[optimizer]
name = "adamw"
weight_decay = 0.1
decay = "matrices"

[verification]
pairs = ["~/data/WebFace42M/lfw.bin", "~/data/WebFace42M/cfp_fp.bin",
         "~/data/WebFace42M/agedb_30.bin"]
every_steps = 2000

[[stages]]
name = "sampled"
epochs = 20
optimizer.lr = 1e-3
schedule.warmup_steps = 6912
schedule.final_factor = 0.83333

[[stages]]
name = "penalty"
epochs = 40
losses.center.weight = 10.0
optimizer.lr = 8.3333e-4
schedule.final_factor = 0.6

[[stages]]
name = "full"
epochs = 60
data.global_batch = 8192
head.sample_rate = 1.0
losses.center.weight = 10.0
optimizer.lr = 1.66667e-4
"""

_SPEAKERS = """\
# VoxCeleb2, ResNet-34 with large-margin fine-tuning, as speakers are trained
# (https://arxiv.org/abs/2010.11255): 5,994 speakers, 1,092,009 utterances. Ours: not measured.
#
# The pack has the spectrogram of every utterance as a square picture. For the last epochs the
# margin grows, the rate starts anew far below, and a sample shows more: theirs are 6 s instead of
# 2 s, ours are larger pictures, as a pack has no sound. The network pools, so it takes any size.
# Margins, rates and epochs are those of WeSpeaker's recipe of the same network and data.
#
{commands}

[run]
folder = "runs/voxceleb2_r34"

[data]
train = "~/data/voxceleb2/train.rec"
global_batch = 256
image_size = 112
flip = 0.0  # time does not run backwards

[backbone]
name = "timm/resnet34"
embedding_dim = 256

[backbone.options]
pooled = true

[head.margin]
name = "arcface"
scale = 32
angular = 0.2

[head.optimizer]
weight_decay = 1e-4

[optimizer]
lr = 0.1
weight_decay = 1e-4

[schedule]
name = "cosine"

[[stages]]
name = "train"
epochs = 150
schedule.warmup_steps = 25000

[[stages]]
name = "large_margin"
epochs = 5
data.global_batch = 128
data.image_size = 224
head.margin.angular = 0.5
optimizer.lr = 1e-4
schedule.warmup_steps = 8500
schedule.final_factor = 0.25
"""

RECIPES = {
    "wf42m_lvface": (_LVFACE, {1: 64, 8: 8, 16: 4, 32: 2, 64: 1}),
    "voxceleb2_r34": (_SPEAKERS, {1: 1, 2: 1, 4: 1, 8: 1}),
}
"""By name: the text, and how a share of the batch is cut on so many GPUs of 80 GiB."""


def staged(name: str) -> str:
    """Return one settings file."""
    text, parts_on = RECIPES[name]
    lines = []
    for gpus, parts in parts_on.items():
        start = f"--nnodes={-(-gpus // 8)} --nproc-per-node={min(gpus, 8)}"
        extra = f" optimizer.accumulation={parts}" if parts > 1 else ""
        word = "GPU " if gpus == 1 else "GPUs"
        lines.append(
            f"#   {gpus:2} {word}  torchrun {start} launch/train.py "
            f"configs/recipes/{name}.toml{extra}"
        )
    return text.format(commands="\n".join(lines))

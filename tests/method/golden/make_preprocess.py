"""Writes ``preprocess.npz``: the results of Hugging Face's video and image processors for the frames of
``preprocess_cases``.

    pip install --no-deps "torchvision==0.28.0"   # the one for the installed torch; in an environment of its own
    PYTHONPATH=. python tests/method/golden/make_preprocess.py

The processors need torchvision, and a torchvision that does not fit torch breaks transformers. So the results are
stored, and torchvision is no dependency of the tests. Only its Python part is used: operators of its compiled part are
declared if they are missing. Per case: the grid, the values for float frames (fp32), and those for uint8 frames (levels
of 255).
"""

import warnings

import numpy as np
import torch
from preprocess_cases import CASES, FILE, GEOMETRIES, MUTED, Case, frames_THWC, stored_places

warnings.filterwarnings("ignore")
OPERATORS = ("nms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d", "qnms", "qroi_align")
BACKWARDS = ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")


def declare_operators() -> torch.library.Library:
    """They live as long as the returned library."""
    library = torch.library.Library("torchvision", "DEF")
    for name in (*OPERATORS, *(f"_{name}_backward" for name in BACKWARDS)):
        library.define(f"{name}(Tensor x) -> Tensor")
    return library


def processor_of(case: Case):
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    geometry = GEOMETRIES[case.geometry]
    settings = dict(
        size={"shortest_edge": geometry.min_pixels, "longest_edge": geometry.max_pixels},
        patch_size=geometry.patch, merge_size=geometry.merge, temporal_patch_size=geometry.temporal_patch,
        image_mean=list(geometry.mean), image_std=list(geometry.std),
    )  # fmt: skip
    if case.is_image:
        return Qwen2VLImageProcessor(**settings)
    if geometry.max_video_tokens:
        settings["max_video_tokens"] = geometry.max_video_tokens
    kind = Qwen3VLVideoProcessor if geometry.bounds == "clip" else Qwen2VLVideoProcessor
    return kind(**settings, do_sample_frames=False, cap_pixels_per_frame=True)


def processed(case: Case, frames_TCHW: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The patches, flat, and the grid. Float frames are in [0, 255]: both kinds are rescaled by 1/255."""
    processor = processor_of(case)
    if case.is_image:
        result = processor(images=[frames_TCHW[0]], return_tensors="pt", input_data_format="channels_first")
        return result["pixel_values"].flatten().numpy(), result["image_grid_thw"].numpy()
    result = processor(videos=[frames_TCHW], return_tensors="pt")
    return result["pixel_values_videos"].flatten().numpy(), result["video_grid_thw"].numpy()


def as_levels(values: np.ndarray, case: Case) -> np.ndarray:
    """Normalised patches of uint8 frames -> their levels, exactly."""
    geometry = GEOMETRIES[case.geometry]
    per_channel = values.reshape(-1, 3, geometry.temporal_patch * geometry.patch**2)
    mean, std = (np.array(x, dtype=np.float64)[:, None] for x in (geometry.mean, geometry.std))
    levels = (per_channel * std + mean) * 255
    assert np.abs(levels - levels.round()).max() < 1e-3
    return levels.round().astype(np.uint8).flatten()


def main() -> None:
    operators = declare_operators()
    arrays = {}
    for case in CASES:
        pixels = torch.from_numpy(frames_THWC(case)).permute(0, 3, 1, 2)
        values, grid = processed(case, pixels.float())
        muted = torch.from_numpy(frames_THWC(case, *MUTED)).permute(0, 3, 1, 2)
        levels = as_levels(processed(case, muted)[0], case)
        places = stored_places(values.size)
        arrays |= {
            f"{case.name}/grid": grid,
            f"{case.name}/float": values[places],
            f"{case.name}/uint8": levels[places],
        }
        print(f"{case.name:24} {grid.tolist()} {values.size} values, {len(places)} kept")
    np.savez_compressed(FILE, **arrays)
    print(f"{FILE.name}: {FILE.stat().st_size / 1024:.0f} KiB")
    del operators


if __name__ == "__main__":
    main()

"""File names of clips for VBench."""

from lowmem_drf.scoring.vbench import clip_names


def test_a_name_is_the_prompt_where_it_can_be_one():
    texts = ["A dog. It runs - 3", "猫が走る", "either/or", "x" * 300, "a dog. it runs - 3"]
    names = clip_names(texts, 2, most=235)
    assert names[:4] == ["A dog. It runs - 3-0.mp4", "A dog. It runs - 3-1.mp4", "猫が走る-0.mp4", "猫が走る-1.mp4"]
    assert names[4].startswith("either-or-") and names[6].startswith("xxx")
    # names that differ in case alone are one file on some systems
    assert len({name.casefold() for name in names}) == len(names) == 10
    assert all(len(name.encode()) <= 235 and "/" not in name for name in names)

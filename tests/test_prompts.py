"""Prompt files and the resumable stream."""

import json

import pytest

from lowmem_drf.errors import BadInputError
from lowmem_drf.prompts import Cursor, PromptStream, as_prompts, fingerprint, load_prompts
from lowmem_drf.types import Question


def write(folder, content, name="prompts.txt"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_txt_skips_blank_lines_and_comments(tmp_path):
    prompts = load_prompts(write(tmp_path, "# mine\n\n a red circle \nune fleur bleue é\r\n"))
    assert [(p.id, p.text) for p in prompts] == [("0003", "a red circle"), ("0004", "une fleur bleue é")]


def test_only_a_newline_ends_a_line(tmp_path):
    odd = "one\u2028two\x85three"
    rows = json.dumps({"prompt": odd}, ensure_ascii=False) + "\r\n" + '{"prompt": "a dog"}\r\n'
    assert [(p.id, p.text) for p in load_prompts(write(tmp_path, rows, "p.jsonl"))] == [
        ("0001", odd),
        ("0002", "a dog"),
    ]


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path, name):
    line = "a cat" if name == "p.txt" else '{"prompt": "a cat"}'
    assert load_prompts(write(tmp_path, b"\xef\xbb\xbf" + line.encode(), name))[0].text == "a cat"


def test_jsonl_takes_ids_questions_and_a_reference(tmp_path):
    write(tmp_path, b"", "clip.mp4")
    row = {
        "prompt": "a cat",
        "id": "cat",
        "questions": [{"aspect": "TA", "text": "a cat ?", "answer": "yes", "weight": 2, "name": "cat"}],
        "reference_video": "clip.mp4",
    }
    (prompt,) = load_prompts(write(tmp_path, json.dumps(row) + "\n", "p.jsonl"))
    assert prompt.id == "cat"
    assert prompt.questions == (Question("TA", "a cat ?", "yes", "yesno", 2.0, "cat"),)
    assert prompt.reference_video == str(tmp_path / "clip.mp4")


@pytest.mark.parametrize(
    ("content", "name", "said"),
    [
        ("", "p.txt", "holds no prompt"),
        ("# only\n\n", "p.txt", "holds no prompt"),
        (b"a cat\n\xff\xfe dog", "p.txt", r"p\.txt:2: not UTF-8"),
        ("prompt,seed\na cat,1", "p.CSV", r"\.CSV files are not read\. Save the prompts alone, one a line, as \.txt"),
        ("- a cat", "p.yaml", r"one object a line as \.jsonl"),
        ("a cat".encode("utf-16-le"), "p.txt", "zero bytes(.|\n)*UTF-8"),
        ('{"prompt": "a cat"}', "p.txt", r"p\.txt:1: is JSON(.|\n)*Rename"),
        ("a cat", "p.jsonl", r"p\.jsonl:1: not JSON"),
        ('{"prompt": "a"}\n{"promt": "b"}', "p.jsonl", r'p\.jsonl:2: there is no "prompt"'),
        ('{"prompt": " "}', "p.jsonl", r'p\.jsonl:1: there is no "prompt"'),
        ('{"prompt": "a", "seed": 1}', "p.jsonl", r"p\.jsonl:1: unknown key 'seed'"),
        ('{"prompt": "a", "reference_video": "no.mp4"}', "p.jsonl", "does not exist"),
        (
            '{"prompt": "a", "questions": [{"aspect": "XX", "text": "b", "answer": "yes"}]}',
            "p.jsonl",
            "question 1: aspect 'XX'",
        ),
        (
            '{"prompt": "a", "questions": [{"aspect": "TA", "text": "b", "answer": "maybe"}]}',
            "p.jsonl",
            "answer 'maybe'",
        ),
        (
            '{"prompt": "a", "questions": [{"aspect": "TA", "text": "b", "answer": "yes", "weight": -1}]}',
            "p.jsonl",
            "weight -1",
        ),
        (
            '{"prompt": "a", "questions": [{"aspect": "TA", "text": "b", "answer": "yes", "weight": 1e999}]}',
            "p.jsonl",
            "weight inf",
        ),
        (
            '{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "x"}',
            "p.jsonl",
            r"p\.jsonl:2: id 'x' is already used in line 1",
        ),
    ],
)
def test_bad_files_are_refused_with_file_and_line(tmp_path, content, name, said):
    with pytest.raises(BadInputError, match=said):
        load_prompts(write(tmp_path, content, name))


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(BadInputError, match="does not exist"):
            load_prompts(path)


def test_every_pass_holds_every_prompt_once_in_another_order():
    prompts = as_prompts(f"prompt {i}" for i in range(20))
    stream = PromptStream(prompts, seed=3)
    first, second = stream.take(20), stream.take(20)
    assert set(first) == set(second) == set(prompts)
    assert first != second
    assert PromptStream(prompts, seed=3).take(40) == first + second
    assert PromptStream(prompts, seed=4).take(20) != first


@pytest.mark.parametrize("taken", [0, 1, 6, 7, 8, 15])
def test_a_cursor_alone_brings_the_stream_back(taken):
    prompts = as_prompts(f"prompt {i}" for i in range(7))
    whole = PromptStream(prompts, seed=0).take(30)
    stream = PromptStream(prompts, seed=0)
    stream.take(taken)
    assert (
        PromptStream(prompts, 0, Cursor(stream.cursor.epoch, stream.cursor.index)).take(5) == whole[taken : taken + 5]
    )


def test_more_prompts_than_there_are_in_one_take():
    prompts = as_prompts(["a", "b"])
    assert len(PromptStream(prompts, 0).take(5)) == 5


def test_the_fingerprint_sees_every_change():
    prompts = as_prompts(["a", "b"])
    others = [as_prompts(["a", "c"]), as_prompts(["b", "a"]), as_prompts(["a"])]
    assert fingerprint(prompts) == fingerprint(as_prompts(["a", "b"]))
    assert fingerprint(prompts) not in {fingerprint(other) for other in others}

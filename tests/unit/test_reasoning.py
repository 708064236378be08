"""Reasoning benchmarks are read as published; answers in many shapes get the published score."""

import io
import json
from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import pytest
from PIL import Image

from mmheads.tasks import reasoning
from mmheads.tasks.reasoning_answers import (
    choice,
    mathvision_answer,
    mathvista_answer,
    mmmu_answer,
)

NINE = 'B ["four", "nine", "sixteen", "twenty-five"]'
BLANKS = {f"image_{number}": None for number in range(1, 8)}


def png(color: str) -> dict:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), color).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def write(folder, name: str, *rows: dict):
    """A parquet file in the folder, which is given back."""
    path = folder / f"{name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(list(rows)).to_parquet(path)
    return folder


def shape(parts) -> list[str]:
    """Texts as they are, images by the colour of their first pixel."""
    colors = {(255, 0, 0): "RED", (0, 0, 255): "BLUE", (0, 128, 0): "GREEN"}
    return [part if isinstance(part, str) else colors[part.getpixel((0, 0))] for part in parts]


def mmmu_row(**changes) -> dict:
    row = {"id": "validation_Art_7", "question": "Look at <image 1>. Who made it?"}
    row |= {"options": "['Klee', \"O'Keeffe\"]", "answer": "B", "question_type": "multiple-choice"}
    row |= BLANKS | {"image_1": png("red"), "explanation": "", "subfield": "Painting"}
    return row | changes


def vision_row(**changes) -> dict:
    row = {"id": "23", "question": "How heavy is it?\n<image1>\nA square weighs 10 grams."}
    row |= {"options": [], "answer": "140", "image": "images/23.jpg", "level": 1}
    return row | {"decoded_image": png("blue"), "subject": "arithmetic"} | changes


def vista_row(**changes) -> dict:
    row = {"pid": "5", "question": "Find the angle H", "choices": ["97", "102"], "unit": None}
    row |= {"precision": None, "answer": "102", "question_type": "multi_choice"}
    row |= {"answer_type": "text", "image": "images/5.jpg", "decoded_image": png("red")}
    return row | {"query": "Hint: ..."} | changes


def test_mmmu_record_becomes_an_interleaved_question(tmp_path):
    write(tmp_path, "Art/validation-00000-of-00001", mmmu_row())
    (example,) = reasoning.mmmu(tmp_path, subjects=["Art"])
    assert shape(example.context) == ["Look at ", "RED"]
    assert shape(example.question) == [". Who made it?", "\n(A) Klee\n(B) O'Keeffe"]
    assert example.answer == 'B ["Klee", "O\'Keeffe"]'
    assert example.choices == ("A", "B")
    assert example.instruction == "\nAnswer with the letter of the right option alone."
    assert (example.task, example.length, example.evidence) == ("mmmu", 0, None)
    assert example.haystack == (1, reasoning.SUBJECTS.index("Art"), 7)
    (example,) = reasoning.mmmu(tmp_path, subjects=["Art"], mode="cot")
    assert example.instruction.startswith("\nThink step by step.")
    assert example.instruction.endswith('"Answer: " and the letter of the right option.')


def test_images_of_options_stand_in_the_question_and_unnamed_images_come_first(tmp_path):
    row = mmmu_row(
        question="<image 1> Which fits?",
        options="['<image 2>', 'none']",
        image_2=png("blue"),
        image_3=png("green"),
    )
    write(tmp_path, "Art/validation-0", row)
    (example,) = reasoning.mmmu(tmp_path, subjects=["Art"])
    assert shape(example.context) == ["GREEN", "RED"]
    assert shape(example.question) == [" Which fits?", "\n(A) ", "BLUE", "\n(B) none"]


def test_open_question_that_ends_with_its_image_stays_whole(tmp_path):
    row = mmmu_row(question="How long? <image 1>", options="[]", question_type="open")
    write(tmp_path, "Art/validation-0", row | {"answer": "['24/7', '3.429']"})
    write(tmp_path, "Music/validation-0", row | {"answer": "8.4", "id": "validation_Music_1"})
    several, one = reasoning.mmmu(tmp_path, subjects=["Art", "Music"])
    assert (several.context, shape(several.question)) == ((), ["How long? ", "RED"])
    assert (several.answer, one.answer) == ('["24/7", "3.429"]', "8.4")
    assert several.choices == ()
    assert several.instruction == "\nAnswer with a single word, number or phrase alone."
    assert mmmu_answer("24/7", several.answer) == mmmu_answer("3.43", several.answer) == 1


def test_mmmu_reads_subjects_lazily_and_in_order(tmp_path):
    write(tmp_path, "Art/validation-0", mmmu_row())
    examples = reasoning.mmmu(tmp_path, subjects=["Art", "Music"])
    assert next(examples).haystack[-1] == 7
    with pytest.raises(ValueError, match=r"holds no file 'Music/validation-\*'"):
        next(examples)


def test_mmmu_pro_is_read_as_text_and_as_a_picture(tmp_path):
    ten = [str(n) for n in range(10)]
    row = mmmu_row(id="test_History_3", options=str(ten), answer="J")
    del row["question_type"]
    write(tmp_path, "standard (10 options)/test-00000-of-00002", row)
    seen = {"id": "test_History_3", "image": png("blue"), "options": str(ten), "answer": "J"}
    write(tmp_path, "vision/test-00000-of-00004", seen)
    (text,) = reasoning.mmmu_pro(tmp_path)
    (picture,) = reasoning.mmmu_pro(tmp_path, config="vision")
    assert text.choices == picture.choices == tuple("ABCDEFGHIJ")
    assert text.answer == picture.answer == f"J {json.dumps(ten)}"
    assert shape(text.question)[-1].endswith("\n(J) 9")
    assert shape(picture.context) == ["BLUE"]
    assert shape(picture.question) == ["Answer the multiple-choice question in the image."]
    history = reasoning.SUBJECTS.index("History")
    assert (text.haystack, picture.haystack) == ((1, 2, history, 3), (2, 2, history, 3))


def test_mathvision_puts_its_image_where_the_one_place_is(tmp_path):
    several = "When the ant <image1> walks, where is <image2>?"
    letters = vision_row(id="33", question=several, options=list("ABCDE"), answer="A")
    write(tmp_path, "data/test-00000-of-00001-35", vision_row(), letters)
    one, two = reasoning.mathvision(tmp_path)
    assert shape(one.context) == ["How heavy is it?\n", "BLUE"]
    assert shape(one.question) == ["\nA square weighs 10 grams."]
    assert (one.answer, one.choices, one.haystack) == ("140", (), (23,))
    assert one.instruction == "\nAnswer with a number or an expression alone."
    assert shape(two.context) == ["BLUE"]
    assert shape(two.question) == [several, "\n(A) A\n(B) B\n(C) C\n(D) D\n(E) E"]
    assert two.answer == 'A ["A", "B", "C", "D", "E"]'


@pytest.mark.parametrize(
    ("changes", "answer", "form"),
    [
        ({}, 'B ["97", "102"]', "the letter of the right option"),
        ({"answer": "1000", "answer_type": "integer"}, "1000", "an integer"),
        (
            {"answer": "0.6", "answer_type": "float", "precision": 2.0},
            "0.60",
            "a number with decimal places: 2",
        ),
        ({"answer": "[0, 2]", "answer_type": "list"}, "[0, 2]", "a list such as [1, 2, 3]"),
    ],
)
def test_mathvista_answers_have_a_form_each(tmp_path, changes, answer, form):
    if changes:
        changes = {"question_type": "free_form", "choices": None} | changes
    write(tmp_path, "data/testmini-0", vista_row(unit="g", **changes))
    (example,) = reasoning.mathvista(tmp_path)
    assert shape(example.context) == ["RED"]
    assert example.question[0] == "Find the angle H (Unit: g)"
    assert (example.answer, example.haystack) == (answer, (5,))
    assert example.instruction == f"\nAnswer with {form} alone."
    assert len(example.choices) == (0 if changes else 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": "Klee, O'Keeffe"}, 'options is "Klee, O\'Keeffe"; expected a Python list'),
        ({"options": "__import__('os')"}, "expected a Python list"),
        ({"options": "['Klee']"}, "expected a Python list of two texts"),
        ({"options": "[['Klee'], 'x']"}, "expected a Python list"),
        ({"answer": "C"}, "answer is 'C'; expected one of A, B"),
        ({"answer": "?"}, r"answer is '\?'; expected one of A, B"),
        ({"question": "See <image 2>."}, "image 2, which the text names, is None"),
        ({"question": " "}, "question is  : expected a text that is not empty"),
        (
            {"image_1": {"bytes": b"no image", "path": None}},
            "image 1, .* is damaged, or not an image",
        ),
        (
            {"question_type": "essay"},
            "question_type is essay: Input should be 'multiple-choice' or 'open'",
        ),
        ({"id": "validation_Alchemy_1"}, "id is 'validation_Alchemy_1'"),
    ],
)
def test_wrong_mmmu_records_are_said_with_their_row(tmp_path, changes, message):
    write(tmp_path, "Art/validation-0", mmmu_row(), mmmu_row(**changes))
    examples = reasoning.mmmu(tmp_path, subjects=["Art"])
    next(examples)
    with pytest.raises(ValueError, match=rf"(?s)validation-0.parquet, row 1: .*{message}"):
        next(examples)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": "103"}, r"'103' is none of the choices \['97', '102'\]"),
        ({"decoded_image": None}, "the image is None; expected an image"),
        ({"pid": "x"}, "pid is x: String should match pattern"),
        (
            {"question_type": "free_form", "answer_type": "integer", "answer": "x"},
            "is not a number",
        ),
        ({"question_type": "free_form", "answer_type": "integer", "answer": "nan"}, "not a number"),
        ({"question_type": "free_form", "answer_type": "list", "answer": "1, x"}, "is not a list"),
        ({"question_type": "free_form", "answer_type": "float"}, "'float' with precision None"),
    ],
)
def test_wrong_mathvista_records_are_said(tmp_path, changes, message):
    write(tmp_path, "data/testmini-0", vista_row(**changes))
    with pytest.raises(ValueError, match=message):
        list(reasoning.mathvista(tmp_path))


def test_other_columns_are_one_error(tmp_path):
    for column, row in (("options", mmmu_row()), ("question_type", mmmu_row())):
        del row[column]
        write(tmp_path, "Art/validation-0", row)
        with pytest.raises(
            ValueError, match=f"the field '{column}' is missing; there are id, question"
        ):
            list(reasoning.mmmu(tmp_path, subjects=["Art"]))
    write(tmp_path, "data/test-0", vision_row(options="['A']"))
    with pytest.raises(ValueError, match=r"options is .*: Input should be a valid list"):
        list(reasoning.mathvision(tmp_path))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "mmlu",
            {},
            "benchmark is 'mmlu'; expected one of .'mmmu', 'mmmu_pro', 'mathvision', 'mathvista'",
        ),
        ("mmmu", {"mode": "tree"}, "mode is 'tree'"),
        ("mmmu", {"subjects": ["Alchemy"]}, "'Alchemy'.* unknown"),
        ("mmmu_pro", {"config": "audio"}, "config is 'audio'"),
        ("mathvista", {"limit": 0}, "limit is 0"),
    ],
)
def test_unknown_settings_are_refused(tmp_path, name, settings, message):
    with pytest.raises(ValueError, match=message):
        reasoning.read_benchmark(name, tmp_path, **settings)


def test_benchmarks_are_read_by_name_and_their_own_answers_are_right(tmp_path):
    write(tmp_path, "Art/validation-0", mmmu_row())
    write(tmp_path, "vision/test-0", mmmu_row(id="test_Art_1", image=png("red")))
    write(tmp_path, "data/test-0", *(vision_row(id=str(n)) for n in range(9)))
    write(tmp_path, "data/testmini-0", vista_row())
    settings = {"mmmu": {"subjects": ["Art"]}, "mmmu_pro": {"config": "vision"}}
    for name, benchmark in reasoning.BENCHMARKS.items():
        examples = reasoning.read_benchmark(name, tmp_path, limit=3, **settings.get(name, {}))
        assert len(examples) == (3 if name == "mathvision" else 1)
        assert {example.task for example in examples} == {name}
        gold = examples[0].answer
        right = gold[0] if examples[0].choices else gold
        for given in (right, f"4 + 4 = 8, or A?\nAnswer: {right}", f"\\boxed{{{right}}}"):
            assert benchmark.metric(given, gold) == 1
        assert benchmark.metric("", gold) == benchmark.metric("Answer:", gold) == 0


def test_chance_is_the_mean_over_examples(tmp_path):
    write(tmp_path, "data/test-0", vision_row(), vision_row(options=list("ABCDE"), answer="A"))
    assert reasoning.chance(reasoning.mathvision(tmp_path)) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="no example"):
        reasoning.chance([])


@pytest.mark.parametrize(
    "answer",
    [
        *("B", "b", "(B)", "**B**", "B.", "B) nine", "B: nine", "**B.** nine", "$B$", " B\n"),
        *("B, because it is odd and all of the other three options are even or too large",),
        *("The answer is B.", "The correct answer is (B) nine.", "Option B", "It must be (b) B."),
        *("nine", "It is Nine.", "A dog has nine of them", r"\boxed{B}", r"\boxed{\text{B}}"),
        *("A and C are wrong, so B", "Between A or B, it is (B)"),
        *("(A) is four. So (C) falls.\nAnswer: B", "Answer: A\nWait.\n**Answer:** (B)"),
        *("answer : B. nine", "Answer:\n\n**B**", "Answer: B\nThis leaves A, C and D."),
    ],
)
def test_the_option_an_answer_picks_is_found(answer):
    assert choice(answer, NINE) == mmmu_answer(answer, NINE) == 1


@pytest.mark.parametrize(
    "answer",
    [
        *("", " ", "A", "(C)", "**D**", "four", "A or B", "A, B", "(A) and (B)", "B/C", "A, B."),
        *("four or nine", "E", "F.", "none of them", "ninety", "A dog", "Answer:"),
        *("B\nAnswer: A", "Answer: four", "The answer is A, not B", "Answer: B or C"),
        *("We look at side B of the figure, which is longer than all of its other sides",),
    ],
)
def test_wrong_unclear_and_missing_options_score_nothing(answer):
    assert choice(answer, NINE) == mmmu_answer(answer, NINE) == 0


def test_options_are_told_apart_by_their_whole_text():
    gold = 'E ["A", "B", "C", "D", "C or D"]'
    assert choice("C or D", gold) == choice("E", gold) == 1
    assert choice("C", gold) == 0
    assert choice("It is 9.5", 'A ["9.5", "9"]') == 1
    assert choice("It is 9.5", 'B ["9.5", "9"]') == 0
    assert choice("twenty-five", 'D ["twenty", "five", "x", "twenty-five"]') == 1


def test_choice_takes_a_letter_alone_as_gold():
    assert choice("(J)", "J") == 1
    assert choice("nine", "B") == 0
    for gold in ("four", "", 'E ["four", "nine"]', "B [four]"):
        with pytest.raises(ValueError, match="is not an option"):
            choice("B", gold)


@pytest.mark.parametrize(
    ("answer", "gold", "score"),
    [
        ("2.83", "2.83", 1),
        ("The current is 2.834 A.", "2.83", 1),
        ("2.84", "2.83", 0),
        ("It costs $2,000,000 in all", "2000000", 1),
        ("1,249.00", "1249", 1),
        ("1,249.5", "1249", 0),
        ("x = -120", "-120", 1),
        ("x = \N{MINUS SIGN}120", "-120", 1),
        ("120", "-120", 0),
        ("10-20", "-20", 0),
        ("3e2 V", "300", 1),
        ("50%", "50", 1),
        ("50", "50%", 0),
        ("First 5, then 7.\nSo the total is 12", "12", 1),
        ("Answer: 7\nThe total is 12", "12", 0),
        ("The artist is Paul Klee", "paul klee", 1),
        ("Paul Klee is the artist", "Paul Klee", 0),
        ("phase b", "b", 1),
        ("absent", "b", 0),
        ("nan", "0", 0),
        ("", "8", 0),
        ("two", '["2", "two"]', 1),
    ],
)
def test_open_answers_of_mmmu(answer, gold, score):
    assert mmmu_answer(answer, gold) == score


@pytest.mark.parametrize(
    ("answer", "gold", "score"),
    [
        ("14", "14", 1),
        ("14.7", "14", 1),
        ("15", "14", 0),
        ("There are 14 apples.", "14", 1),
        ("20 apples, 6 gone, leaves 14", "14", 1),
        ("20 - 6 = 14", "14", 1),
        ("20 were there.\nAnswer: 14 of 20", "14", 1),
        ("1,000 g", "1000", 1),
        ("45%", "45", 1),
        ("-3", "-3", 1),
        ("3", "-3", 0),
        ("5 cm^2", "5", 1),
        ("fourteen", "14", 0),
        ("", "14", 0),
        (r"\boxed{1{,}000}", "1000", 1),
        ("0.599", "0.60", 1),
        ("0.6", "0.60", 1),
        ("0.61", "0.60", 0),
        ("3/5", "0.60", 1),
        (r"$\frac{3}{5}$", "0.60", 1),
        ("1.24", "1.2", 1),
        ("1.26", "1.2", 0),
        ("[0, 2, 4]", "[0, 2, 4]", 1),
        ("Answer: [0,2,4]", "[0, 2, 4]", 1),
        ("The list is [0, 2, 4] as drawn", "[0, 2, 4]", 1),
        ("[0, 4, 2]", "[0, 2, 4]", 0),
        ("[0, 2]", "[0, 2, 4]", 0),
        ("0, 2, 4", "[0, 2, 4]", 0),
        ("(B)", NINE, 1),
        ("four", NINE, 0),
    ],
)
def test_answers_of_mathvista(answer, gold, score):
    assert mathvista_answer(answer, gold) == score


def test_a_gold_answer_of_no_kind_is_refused():
    with pytest.raises(ValueError, match="'half' is not an option, number or JSON list"):
        mathvista_answer("half", "half")


@pytest.mark.parametrize(
    ("answer", "gold", "score"),
    [
        ("140", "140", 1),
        ("140.00 grams", "140", 1),
        ("141", "140", 0),
        (r"\frac{1}{2}", "0.5", 1),
        (r"The answer is $\dfrac12$.", "1/2", 1),
        (r"1 \frac{1}{2}", "1.5", 1),
        (r"2\sqrt{3}", r"\sqrt{12}", 1),
        (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}", 1),
        (r"\sqrt[3]{8}", "2", 1),
        (r"4 \pi", "12.57", 1),
        ("4π", r"4\pi", 1),
        (r"\boxed{\frac{2}{3}}", r"\frac{2}{4}", 0),
        (r"x = 2^{3}", "8", 1),
        ("-5", "-5", 1),
        ("5", "-5", 0),
        ("1,234", "1234", 1),
        (r"30^{\circ}", "30", 1),
        (r"50\%", "50", 1),
        (r"$12 \mathrm{~cm}^{2}$", "12", 1),
        ("So there are 6.", "6", 1),
        ("(1, 0.5)", r"(1,\frac{1}{2})", 1),
        ("(2, 1)", "(1, 2)", 0),
        ("2 a b", "2ab", 1),
        ("2a", "2", 0),
        ("The area is 2a", "2", 0),
        (r"\sqrt{x} + 3", "3", 0),
        (r"\frac{1}{4}", 'A ["1", "4"]', 0),
        ("(C)", "C", 1),
        ("D", "C", 0),
        ("2 a b", "2", 0),
        ("12 cm^2", "12", 1),
        ("1+x", "x+1", 1),
        (r"\frac{x^2}{2}", r"\frac{1}{2} x^{2}", 1),
        (r"(-\infty, 2]", r"(-\infty,2]", 1),
        ("9**9**9**9", "1", 0),
        ("9^{9^{9^{9}}}", "1", 0),
        (r"10^{100000000}", "1", 0),
        ("((9!)!)!", "1", 0),
        ("x" * 1000, "1", 0),
        ("1/0", "1", 0),
        ("", "1", 0),
        (r"12 \text{ m}", r'B ["$6 \\mathrm{~m}$", "$12 \\mathrm{~m}$"]', 1),
        (r"$\frac{1}{\sqrt 2}$", r'A ["$\\frac{\\sqrt{2}}{2}$", "1"]', 1),
        ("6 m", r'B ["$6 \\mathrm{~m}$", "$12 \\mathrm{~m}$"]', 0),
        ("5-4-2-3-1", 'B ["5-4-2-3-1", "5-2-3-4-1"]', 0),
        ("E", 'E ["A", "B", "C", "D", "E"]', 1),
    ],
)
def test_answers_of_mathvision(answer, gold, score):
    assert mathvision_answer(answer, gold) == score


def test_expressions_are_compared_in_any_thread():
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(mathvision_answer, r"\frac12", "0.5").result() == 1
        assert pool.submit(mathvista_answer, r"\frac12", "0.50").result() == 1

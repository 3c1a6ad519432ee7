"""VQAv2 (Goyal et al. 2017): open questions with ten reference answers each, on the validation split."""

from raylava.errors import UserError
from raylava.evaluation.benchmarks.benchmark import OfficialBenchmark
from raylava.evaluation.benchmarks.files import check_no_label_left, read_json, require_file, short_answer
from raylava.evaluation.metrics.scoring import VQA_ACCURACY
from raylava.evaluation.questions import Question
from raylava.storage import StoragePath


def _read(data: StoragePath) -> list[Question]:
    question_file = require_file(data, "v2_OpenEnded_mscoco_val2014_questions.json", "questions.json")
    annotation_file = require_file(data, "v2_mscoco_val2014_annotations.json", "annotations.json")
    labels = {label["question_id"]: label for label in read_json(annotation_file)["annotations"]}
    questions = []
    for entry in read_json(question_file)["questions"]:
        label = labels.pop(entry["question_id"], None)
        if label is None:
            raise UserError(f"{question_file}: question {entry['question_id']} has no annotation")
        questions.append(
            Question(
                str(entry["question_id"]),
                f"COCO_val2014_{int(entry['image_id']):012d}.jpg",
                short_answer(entry["question"]),
                label.get("answer_type", "all"),
                tuple(answer["answer"] for answer in label["answers"]),
            )
        )
    check_no_label_left(labels, question_file)
    return questions


BENCHMARK = OfficialBenchmark("vqav2", _read, VQA_ACCURACY, image_folders=("val2014",))

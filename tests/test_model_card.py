"""What must stay true of optimus.model_card. Derived in notebooks/13b_model_card.ipynb.

What a whole export writes into its card is in test_interop.
"""
import json

import pytest

from optimus.model_card import recorded_training


@pytest.mark.parametrize("name, shown", [
    ("/home/me/my_texts.txt", "my_texts.txt"), ("secret/acme/mails.txt", "mails.txt"),
    ("acme/mails.txt", "mails.txt"), ("secret/acme/mails", "mails"), ("../acme/mails", "mails"),
    ("~/mails", "mails"), ("here/mails", "mails"),
    (r"C:\Users\me\mails.txt", "mails.txt"), (r"acme\mails", "mails"),
    ("sotu", "sotu"), ("wikimedia/wikipedia", "wikimedia/wikipedia"),
])
def test_a_path_on_a_disk_is_cut_to_its_last_part(tmp_path, monkeypatch, name, shown):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "mails").mkdir(parents=True)  # looks like a name on the hub, and is a folder
    (tmp_path / "trainer_state.json").write_text(json.dumps({"step": 3, "corpus": {"name": name}}))
    assert recorded_training(tmp_path)["training data"] == f"`{shown}`"


@pytest.mark.parametrize("split, shown", [(0.9, "90%"), (0.995, "99.5%"), (0.9999, "99.99%")])
def test_the_share_of_training_documents_is_not_rounded_to_all(tmp_path, split, shown):
    state = {"step": 3, "corpus": {"name": "sotu"}, "training_config": {"train_val_split": split}}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    assert f"; {shown} of the documents train" in recorded_training(tmp_path)["training data"]


@pytest.mark.parametrize("text", ["", "{", "[]",
                                  '{"step": "three", "corpus": null, "run": {"best_loss": null}}'])
def test_a_checkpoint_that_says_nothing_is_not_made_to_speak(tmp_path, text):
    (tmp_path / "trainer_state.json").write_text(text)
    if "step" not in text: assert set(recorded_training(tmp_path).values()) == {"not recorded"}
    else: assert recorded_training(tmp_path)["steps"] == "not recorded"

"""recipe/: labels, counts and choices of the suite's builders; pictures from made-up scores."""
import json
import xml.etree.ElementTree as xml

import choose
import make_suite as suite
import make_transfer as transfer
import pytest
import torch
from conftest import assert_close, make_qwen, noise, tone, write_clip, write_manifest
from fast_qwen import FastQwen
from uniwhisper import load_decoder


@pytest.fixture
def plot():
    pytest.importorskip("matplotlib")
    import plot
    return plot


def test_the_first_pattern_that_fits_gives_the_label():
    sounds = {name: pattern for name, (_, pattern) in suite.SOUNDS.items()}
    for name, label in [("wolf_hit.ogg", "animal"), ("worker_die1.wav", "person in pain"),
                        ("worker_mine.wav", "workshop"), ("archer_attack.wav", "bow and arrow"),
                        ("parkland01.wav", "outdoor ambience"), ("parklandlake.wav", "water"),
                        ("click.wav", None)]:
        assert suite.first_match(sounds, "/" + name) == label, name
    for name, label in [("open hh", "hi-hat"), ("floor tom", "tom"), ("", None)]:
        assert suite.first_match(suite.DRUMS, name) == label, name
    for path, label in [("/freedroid/screenshot.wav", None), ("/weapons/mine_beep.ogg", None),
                        ("/bzflag/fire.wav", "explosion or gunshot")]:
        assert suite.first_match(transfer.OTHER_SOUNDS, path) == label, path


def test_counts_are_checked():
    assert "note" not in suite.check("drum", (326, 129, 127, 0.204), (326, 129, 127, 0.20))
    more = suite.check("drum", (326, 129, 128, 0.20), (326, 129, 127, 0.20))
    assert more.endswith("note: Debian 12 has 326 / 129 / 127 clips, 0.20 h") and "\n" not in more
    with pytest.raises(SystemExit, match="error: drum: no clip in valid"):
        suite.check("drum", (326, 0, 127, 0.20), (326, 129, 127, 0.20))
    with pytest.raises(SystemExit, match="needs no-such-command: apt-get install fluidsynth"):
        suite.need(["no-such-command", "sh"], "fluidsynth")


def test_a_task_keeps_a_recording_once(tmp_path):
    task = suite.Task(tmp_path, "drum", "music", "Which drum?", (1, 1, 0, 0.0))
    clip = suite.np.full(1600, 0.1, suite.np.float32)
    for split, audio in (("train", clip), ("test", clip), ("train", None), ("valid", clip / 2)):
        task.add(audio, split, "kick")
    task.close()
    rows = list(map(json.loads, (tmp_path / "drum.jsonl").read_text().splitlines()))
    assert [(row["split"], row["seconds"]) for row in rows] == [("train", 0.1), ("valid", 0.1)]


def test_captions_and_notes():
    assert suite.captions(["A dog barks.", "Hands clap."]) == [
        "A dog barks, then hands clap.", "First a dog barks; after that, hands clap.",
        "You hear how a dog barks before hands clap."]
    assert suite.midi(5, [(60, 100)]) == bytes.fromhex(
        "4d546864 00000006 0000 0001 01e0  4d54726b 00000015"
        "00c005  00903c64 8900803c00 8600b07b00 00ff2f00".replace(" ", ""))


def scores(path, silence=1.0, **tasks):
    """A file of probe.py --json: {task: (knn, mlp)}."""
    tasks = {name: {"knn": knn, "mlp": mlp} for name, (knn, mlp) in tasks.items()}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"settings": {"silence": silence},
                                "encoders": {"encoder": {"tasks": tasks}}}))


def choose_share(folder, capsys, shares):
    """{share: (the suite's scores, command_flite's)} -> what choose.py prints; untouched has .7."""
    for share, (own, other) in shares.items():
        scores(folder / f"share-{share}.json", drum=(own, own), voice=(own, own),
               caption=(None, own), command_flite=(other, other))
    scores(folder / "untouched.json", command_flite=(.7, .7))
    choose.main(["share", *map(str, [folder / "untouched.json", *folder.glob("share-*.json")])])
    return capsys.readouterr()


def test_the_share_of_the_best_mean_that_keeps_other_sources(tmp_path, capsys):
    out, err = choose_share(tmp_path, capsys, {1: (.9, .67), 0.5: (.6, .69), 0.25: (.6, .69)})
    assert out == "0.25\n"
    assert "share 1: 0.7850, loses 0.0300" in err and "share 0.5: 0.6450, loses 0.0100" in err


def test_the_share_that_loses_least_if_all_lose_much(tmp_path, capsys):
    assert choose_share(tmp_path, capsys, {1: (.9, .3), 0.5: (.6, .6)}).out == "0.5\n"


def test_fewer_clips_are_the_same_each_time(tmp_path):
    rows = [{"audio": f"a/{i}.flac", "split": ("train", "valid", "test")[i % 3]} for i in range(30)]
    write_manifest(tmp_path / "drum.jsonl", rows)
    texts = []
    for out in (tmp_path / "part", tmp_path / "again"):
        choose.main(["clips", "4", "20", str(out), str(tmp_path / "drum.jsonl")])
        texts.append((out / "drum.jsonl").read_text())
    kept = [json.loads(line.replace("../a", "a")) for line in texts[0].splitlines()]
    assert texts[0] == texts[1] and texts[0].count("train") == 4 and len(kept) == 24
    assert kept == [row for row in rows if row in kept]


def test_the_picture_and_the_table(plot, tmp_path, capsys):
    for folder, silence in (("test", 1), ("part", 1), ("part-30s", 30)):
        for name, base in (("untouched", .5), ("seed-0", .6), ("seed-1", .7)):
            score = base + (silence == 30) * .05
            scores(tmp_path / folder / f"{name}.json", silence, drum=(score, score),
                   caption=(None, .3), letters_language=(base - .2 * (name != "untouched"), .9))
    plot.main([str(tmp_path)])
    table, path = capsys.readouterr().out.rsplit("\n", 2)[:2]
    assert path == str(tmp_path / "scores.svg") and xml.parse(path).getroot().tag.endswith("svg")
    assert "| a part | trained, seeds: 2 | 1 s | 0.650 / 0.475 | 0.450 / 0.900 |" in table
    assert "| a part | untouched | 30 s | 0.550 / 0.425 | 0.500 / 0.900 |" in table
    knn, mlp = plot.scores_figure(tmp_path).axes  # over the better of untouched
    assert [text.get_text() for text in knn.texts] == ["+0.100", "-0.050"]
    assert [text.get_text() for text in mlp.texts] == ["+0.100", "+0.000", "+0.000"]


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_the_fast_qwen_has_the_plain_ones_states_and_gradients(tmp_path, kind):
    make_qwen(tmp_path, kind)
    prompts, answers = [[5, 6, 7], [8], [5, 6, 7]], [[1, 2], [3], [4, 5, 6, 7]]
    lengths, results = torch.tensor([2, 6, 1]), []
    for decoder in (load_decoder(tmp_path), FastQwen.from_pretrained(tmp_path)):
        for _ in range(2):  # the second time the prompts' keys are known
            audio = noise(3 * 6 * decoder.width).view(3, 6, -1).requires_grad_()
            states = decoder.answer_states(audio, lengths, prompts, answers)  # (7, D)
            (states * torch.arange(1, 8)[:, None]).sum().backward()
            results += [states.detach(), audio.grad]
    for ours, plain in zip(results[2:], results[:2] * 3):
        assert_close(ours, plain)


@pytest.mark.filterwarnings("ignore")
def test_others_code_judges_an_encoder_and_a_spectrum(whisper, tmp_path):
    cross_check = pytest.importorskip("cross_check")
    rows = []
    for n in range(24):
        name, audio = ("tone", tone(0.3, 300 + 20 * n)) if n % 2 else ("noise", noise(4000, n))
        write_clip(tmp_path / f"{n}.wav", audio)
        rows.append({"audio": f"{n}.wav", "task": "sound", "label": name, "answer": name,
                     "split": "train" if n < 16 else "test"})
    path = write_manifest(tmp_path / "sound.jsonl", rows)
    cross_check.main(["--encoder", "spectrum", str(whisper[0]), "--data", path,
                     "--json", str(tmp_path / "scores.json")])
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["spectrum"] == {"sound": {"knn": 1.0, "linear": 1.0}}
    assert scores[str(whisper[0])].keys() == {"sound"}


def test_curves_of_a_run(plot, tmp_path, capsys):
    rates = {"encoder": 1e-4, "adapter": 5e-4}
    lines = [{"step": 0, "held_out": {"note": 1.5, "voice": 0.5}},
             {"step": 25, "loss": 2.5, "norm": 3.0, "lr": rates},
             {"step": 40, "non_finite": "inf", "rows": ["a.jsonl, row 3"]},
             {"step": 50, "loss": None, "norm": 2.0, "lr": rates},
             {"step": 50, "held_out": {"note": 0.7, "voice": None}}]
    write_manifest(tmp_path / "metrics.jsonl", lines)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 75, "lo')  # still being written
    plot.main([str(tmp_path)])
    assert capsys.readouterr().out == f"{tmp_path}/metrics.png\n"
    assert (tmp_path / "metrics.png").read_bytes().startswith(b"\x89PNG")
    loss, held_out, norm, rates = plot.training_figure(lines).axes
    assert [len(axes.lines) for axes in (loss, held_out, norm, rates)] == [1, 2, 2, 2]
    assert list(held_out.lines[0].get_ydata()) == [1.5, 0.7]
    assert list(norm.lines[1].get_xdata()) == [40, 40]  # the update left out


def test_errors_are_one_line(plot, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"^plot.py: .*metrics.jsonl"):
        plot.main([str(tmp_path)])
    monkeypatch.setattr(plot, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"pip install -e '.\[plot\]'"):
        plot.main([str(tmp_path)])

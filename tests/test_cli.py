"""What the scripts share at the keyboard."""

from tinyldm.cli import BestEffortStream


def test_a_terminal_that_is_gone_is_not_missed(tmp_path):
    stream = open(tmp_path / "output", "w")
    surviving = BestEffortStream(stream)
    print("heard", file=surviving)
    stream.close()
    print("not heard", file=surviving, flush=True)
    assert (tmp_path / "output").read_text() == "heard\n" and surviving.name == stream.name

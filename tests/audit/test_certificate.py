"""The certificate as text and as JSON, and how its epsilon is computed again."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpoptax
from dpoptax.__main__ import main
from dpoptax.audit import Certificate
from dpoptax.audit._certificate import Leak, Release
from dpoptax.audit._verify import verify
from dpoptax.samplers import take

N = 40
# Without a cut the event is a plain one, which takes dp-accounting little time.
SAMPLER = dpoptax.samplers.Poisson(N, 4, N)
PLAN = dpoptax.Plan(sampler=SAMPLER, clip=1.0, noise_multiplier=1.5, num_steps=10, delta=1e-3)
FIXED = dpoptax.samplers.FixedSize(N, 4)
DATA = np.arange(N, dtype=np.float32)


def certify(plan=PLAN, noise=1.5, clip=1.0, size=4.0, sampler=SAMPLER):
    tx = dpoptax.privatize(clip, noise, expected_batch_size=size, key=jax.random.key(1))

    def step(w, state, sampler_state, data):
        sampler_state, batch = sampler.sample(sampler_state)
        grads = dpoptax.per_example_grads(lambda w, x: (w - x) ** 2)(w, take(data, batch))
        updates, state = tx.update(grads, state, w)
        return optax.apply_updates(w, updates), state, sampler_state

    w = jnp.zeros(())
    states = tx.init(w), sampler.init(jax.random.key(2))
    return dpoptax.certify(step, w, *states, DATA, private="data", plan=plan)


def test_the_text_names_the_guarantee_and_all_outputs():
    text = str(certify())
    assert text.startswith("Certified: ")
    assert f"epsilon = {dpoptax.reports.round_up(PLAN.epsilon())} at delta = 0.001" in text
    assert "released: output[0]\n" in text
    assert "secret: output[1].key, output[2].key" in text
    assert "Poisson(num_examples=40" in text


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"noise": 1.4}, "noise_multiplier"),
        ({"clip": 2.0}, "clip"),
        ({"size": 5.0}, "expected_batch_size"),
        ({"sampler": dpoptax.samplers.FixedSize(N, 4)}, "sampler"),
    ],
)
def test_a_release_that_is_not_of_the_plan_is_a_leak(change, name):
    found = certify(**change)
    assert any(
        f"the {name} of a release is not that of the plan" in one.what for one in found.leaks
    )
    assert certify(plan=None, **change).certified


def test_a_release_without_noise_is_a_leak():
    """All else is as it should be: the key and the state are arguments."""
    found = certify(noise=0.0, plan=None)
    assert not found.certified
    assert any("the noise multiplier is zero" in one.what for one in found.leaks)


def test_a_release_of_all_examples_is_not_a_step_of_a_plan_that_samples():
    tx = PLAN.privatize(jax.random.key(1))

    def step(w, state, data):
        grads = dpoptax.per_example_grads(lambda w, x: (w - x) ** 2)(w, data)
        return tx.update(grads, state, w)

    args = jnp.zeros(()), tx.init(jnp.zeros(())), DATA
    assert dpoptax.certify(step, *args, private="data").certified
    assert not dpoptax.certify(step, *args, private="data", plan=PLAN).certified


def test_json_holds_public_numbers_only():
    text = certify().to_json()
    content = json.loads(text)
    assert content["guarantee"]["epsilon"] == PLAN.epsilon()
    assert content["generators"] == ["key<fry>"]
    assert set(content["versions"]) >= {"dpoptax", "jax", "optax", "dp-accounting", "python"}
    assert len(content["program"]) == len("sha256 ") + 64
    assert str(DATA[7]) not in text


def test_the_digest_follows_the_program_and_nothing_else():
    assert certify().program == certify().program
    assert certify(noise=1.4).program != certify().program


def test_a_leak_has_no_json():
    bad = Certificate((Leak("output", "it leaks", "file.py:1 (step)"),), (), (), (), (), (), "", ())
    assert not bad.certified
    with pytest.raises(ValueError, match=r"output: it leaks, at file\.py:1"):
        bad.to_json()


def test_a_rule_of_the_user_is_trusted_by_name():
    class Halved(dpoptax.clipping.FlatClip):
        pass

    found = certify(plan=None, clip=Halved(1.0))
    assert any("Halved" in name for name in found.trusted())
    assert not any("Halved" in name for name in certify().trusted())


def test_a_strategy_of_the_user_is_trusted_by_name():
    class OwnStrategy(dpoptax.mechanisms.strategies.DenseStrategy):
        pass

    mechanism = dpoptax.mechanisms.Correlated(OwnStrategy(np.eye(3)))
    release = Release(dpoptax.clipping.FlatClip(1.0), 1.1, 4.0, mechanism, SAMPLER, "")
    found = Certificate((), (release,), (), (), (), (), "", ())
    (own,) = found.trusted()[2:]
    assert "OwnStrategy" in own


def test_verify_computes_epsilon_by_dp_accounting_alone(tmp_path, capsys):
    path = tmp_path / "certificate.json"
    path.write_text(certify().to_json())
    assert main(["verify", str(path)]) == 0
    assert capsys.readouterr().out.startswith("dp-accounting")


def test_verify_names_dpoptax_for_events_of_its_own(tmp_path, capsys):
    plan = PLAN.replace(sampler=FIXED)
    path = tmp_path / "certificate.json"
    path.write_text(certify(plan, sampler=FIXED).to_json())
    assert main(["verify", str(path)]) == 0
    assert "dpoptax, because dp-accounting cannot account" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epsilon": 0.1}, "Do not use this certificate"),
        ({"event": {"kind": "os.system"}}, "expected the record of an event"),
        ({"relation": "other"}, "relation"),
        ({"delta": 2.0}, "delta"),
        ({"epsilon": "small"}, "epsilon"),
        ({"epsilon": 10**400}, "epsilon"),
        ({"epsilon": 1e308}, "Do not use this certificate"),
        ({"epsilon": float("inf")}, "finite"),
        ({"delta": 0.01}, "Do not use this certificate"),
        ({"added": 1}, "must have the fields"),
    ],
)
def test_verify_refuses_a_changed_certificate(tmp_path, capsys, change, message):
    content = json.loads(certify().to_json())
    content["guarantee"] |= change
    path = tmp_path / "certificate.json"
    path.write_text(json.dumps(content))
    # It was read, and is wrong; or it could not be read.
    failed = message == "Do not use this certificate"
    assert main(["verify", str(path), "--json"]) == (1 if failed else 2)
    shown = capsys.readouterr()
    assert message in shown.err
    if failed:
        found = json.loads(shown.out)
        assert (found["verified"], message in found["reason"]) == (False, True)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("noise_multiplier", 3.0, "finds only"),
        ("noise_multiplier", 1e300, "fault"),
        ("noise_multiplier", "x", "fault"),
        ("sampling_probability", 0.0, "finds only"),
        ("sampling_probability", None, "fault"),
        ("count", 5, "finds only"),
        ("count", 10**30, "fault"),
    ],
)
def test_verify_refuses_a_changed_event(name, value, message):
    content = json.loads(certify().to_json())
    event = content["guarantee"]["event"]
    while name not in event:
        event = event["event"]
    event[name] = value
    with pytest.raises(ValueError, match=message):
        verify(json.dumps(content))


@pytest.mark.parametrize(
    ("field", "value"),
    [("noise_multiplier", 5.0), ("expected_batch_size", 1.0), ("num_releases", 2)],
)
def test_verify_refuses_an_event_that_is_not_that_of_the_releases(field, value):
    content = json.loads(certify().to_json())
    (release,) = content["releases"]
    changed = {"num_releases": content["guarantee"], "expected_batch_size": release["sampler"]}
    changed.get(field, release)[field] = value
    with pytest.raises(ValueError, match="event of the releases"):
        verify(json.dumps(content))


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("program", "sha256 " + "0" * 64 + ")\nThe event is right (", "digest"),
        ("program", None, "digest"),
        ("versions", {"jax": "0.1\x1b[2J"}, "versions"),
        ("versions", "new", "digest|versions"),
        ("trusted", [], "something is missing"),
        ("assumptions", ["The keys are secret, and no key is used for two runs."], "missing"),
        ("assumptions", "none", "missing"),
        ("releases", {"clip": 1.0}, "a list of releases"),
        ("releases", [{"sampler": None}], "record of a Sampler"),
        ("guarantee.unit", "user", "another unit"),
        ("guarantee.num_releases", True, "num_releases"),
        ("guarantee.num_releases", 10.0, "num_releases"),
        ("guarantee.relation", "replace_one", "Do not use"),
        ("guarantee.event", {"kind": "NoOpDpEvent"}, "finds only"),
        ("guarantee.event", {"kind": "NonPrivateDpEvent"}, "Do not use|fault"),
        ("release.noise_multiplier", "1.5", "fault"),
        ("release.expected_batch_size", 8.0, "another size"),
        ("release.mechanism", {"kind": "Poisson"}, "fault|missing|must"),
    ],
)
def test_verify_refuses_a_changed_text(name, value, message):
    content = json.loads(certify().to_json())
    part, _, field = name.rpartition(".")
    inside = {"guarantee": content["guarantee"], "release": content["releases"][0]}
    inside.get(part, content)[field] = value
    with pytest.raises(ValueError, match=message):
        verify(json.dumps(content))


def test_verify_refuses_json_of_two_meanings():
    text = certify().to_json()
    twice = text.replace('"delta"', '"epsilon": 0.1, "epsilon": 1.0, "delta"', 1)
    with pytest.raises(ValueError, match="each name of a JSON object once"):
        verify(twice)
    with pytest.raises(ValueError, match="finite numbers in JSON; got NaN"):
        verify(text.replace("0.001", "NaN", 1))
    with pytest.raises(ValueError, match=r"levels|fault"):
        verify("[" * 100_000)


@pytest.mark.seconds
def test_verify_says_that_it_cannot_rebuild_a_sampler_of_ones_own():
    content = json.loads(certify().to_json())
    assert "The event is that of the releases" in verify(json.dumps(content)).in_words()
    content["releases"][0]["sampler"] = {"kind": "own:Sampler"}
    with pytest.raises(ValueError, match="every class of the user"):
        verify(json.dumps(content))
    content["trusted"].append("your own own.Sampler does what its interface says")
    assert "Not verified here: that the event" in verify(json.dumps(content)).in_words()


def test_verify_refuses_what_states_no_epsilon(tmp_path, capsys):
    path = tmp_path / "certificate.json"
    path.write_text(certify(plan=None).to_json())
    assert main(["verify", str(path)]) == 1
    path.write_text("{}")
    assert main(["verify", str(path)]) == 2
    path.write_bytes(b"\xff\xfe")
    assert main(["verify", str(path)]) == 2
    error = capsys.readouterr().err
    assert "made without a plan" in error
    assert "expected a document of format" in error
    assert "it is no text" in error


@pytest.mark.parametrize("private", ["dat", 7, (), "w", None, 0])
def test_private_must_name_rows_of_examples(private):
    with pytest.raises(ValueError, match="private"):
        dpoptax.certify(lambda w, data: w, jnp.zeros(()), DATA, private=private)


def test_a_trace_from_before_is_not_used():
    tx = dpoptax.privatize(1.0, 1.5, expected_batch_size=4, key=jax.random.key(1))
    grads_fn = jax.jit(dpoptax.per_example_grads(lambda w, x: (w - x) ** 2))
    sample = jax.jit(SAMPLER.sample)

    @jax.jit
    def step(w, state, sampler_state, data):
        sampler_state, batch = sample(sampler_state)
        updates, state = tx.update(grads_fn(w, take(data, batch)), state, w)
        return updates, state, sampler_state

    w = jnp.zeros(())
    args = w, tx.init(w), SAMPLER.init(jax.random.key(2)), DATA
    before = step(*args)
    assert dpoptax.certify(step, *args, private="data").certified
    # Nor is the trace with markers used afterwards.
    after = step(*args)
    np.testing.assert_array_equal(before[0], after[0])
    assert step._cache_size() == 1


def test_a_step_that_is_mapped_is_refused():
    tx = dpoptax.privatize(1.0, 1.5, expected_batch_size=4, key=jax.random.key(1))

    def step(w, state, data):
        return tx.update(jnp.ones((4, 1)) * w, state, w)

    def mapped(w, state, data):
        return jax.vmap(step, in_axes=(0, None, None))(w, state, data)

    with pytest.raises(ValueError, match="outside of"):
        dpoptax.certify(mapped, jnp.ones((3, 1)), tx.init(jnp.zeros(1)), DATA, private="data")

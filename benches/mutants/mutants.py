"""Mutation tests: careless edits are made one at a time, and those that no test detects are listed.

    python3 benches/mutants/mutants.py [--only 3,17] [--list] [--out target/mutants]

The tree is copied to the output folder, and all edits of the list below are put into the copy at once. Each is inactive at first: where an
edit has M0, the copy checks whether this mutant is active. So everything is compiled once. Then, for each mutant, the test binaries that
should detect it run with its number in PRISMGRAD_MUTANT. Each mutant gives a line of output, and the survivors are listed at the end. The
exit status is 1 if more than 3 % survive. It takes about an hour on two cores, so it is a nightly command.
"""

import argparse, json, os, re, subprocess, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Each entry: (file below src, text that occurs in it once, edit with M0, M1, … for its mutants, what they do, the test files that should
# detect them). An edit in several places has a tuple of texts and a tuple of edits. Tests after a + are built with the feature `emulator`.
# After a colon, a slow binary has a part of the names of the tests that should run.
EDITS = [
    ("privacy/clip.rs", "ClipFn::Abadi => threshold / n,", "ClipFn::Abadi => (if M0 { 2.0 } else { 1.0 }) * threshold / n,",
     ["Abadi clips to twice the threshold"], "lib:clip sensitivity"),
    ("privacy/clip.rs", "threshold / (n + gamma)", "threshold / (n + if M0 { 0.0 } else { gamma })", ["AUTO-S without γ"], "lib:clip sensitivity"),
    ("privacy/clip.rs", "(n <= threshold) as u8 as f64", "(n <= if M0 { 2.0 } else { 1.0 } * threshold) as u8 as f64",
     ["global clipping keeps twice the threshold"], "lib:clip sensitivity"),
    ("privacy/clip.rs", "1.0 / n.max(threshold)", "1.0 / if M0 { n.min(threshold) } else { n.max(threshold) }",
     ["re-parameterised the wrong way round"], "lib:clip sensitivity"),
    ("privacy/clip.rs", "(threshold / n).min(1e30)", "(threshold / n).min(if M0 { f64::INFINITY } else { 1e30 })",
     ["AUTO-V overflows for tiny gradients"], "lib:clip sensitivity"),
    ("privacy/clip.rs", "            return 0.0;\n", "            return if M0 { 1.0 } else { 0.0 };\n", ["a norm that is not finite has weight 1"],
     "lib:clip sensitivity training"),
    ("privacy/clip.rs", "ClipFn::Reparameterised => 1.0,", "ClipFn::Reparameterised => if M0 { 0.5 } else { 1.0 },",
     ["the re-parameterised function's sensitivity halved"], "lib:clip sensitivity"),
    ("privacy/clip.rs", "total / (groups.max(1) as f64).sqrt()", "total / (if M0 { 1 } else { groups.max(1) } as f64).sqrt()",
     ["every group clips to the whole threshold"], "lib:clip privacy training"),
    ("privacy/clip.rs", "total * w / norm", "total * w / if M0 { 1.0 } else { norm }", ["weighted thresholds are not normalised"], "lib:clip"),
    ("privacy/sampling.rs", "self.key.uniforms(step, self.records)", "self.key.uniforms(if M0 { 0 } else { step }, self.records)",
     ["the same Poisson batch at every step"], "lib:sampling privacy"),
    ("privacy/sampling.rs", "u[i] < self.rate)", "u[i] < if M0 { 1.03 } else { 1.0 } * self.rate)", ["sampling rate 3 % up"], "lib:sampling privacy"),
    ("step/noise.rs", "self.gradient_noise_multiplier() * self.sensitivity()",
     "(if M0 { 0.5 } else { 1.0 }) * self.gradient_noise_multiplier() * (if M1 { 1.0 } else { self.sensitivity() })",
     ["noise halved", "noise without the sensitivity"], "privacy training"),
    # The step is part of the key of a release and of the stream that is drawn with it; either of them is enough to separate steps.
    ("step/noise.rs", ("_ => key.for_release(step, context, sum),", "add_gaussian::<T>(key, step, first as u64, std,"),
     ("_ => key.for_release(if M0 { 0 } else { step }, if M1 { [0; 4] } else { context }, if M2 { [0; 4] } else { sum }),",
      "add_gaussian::<T>(key, if M0 { 0 } else { step }, first as u64, std,"),
     ["noise does not depend on the step", "noise does not depend on its scale", "noise does not depend on the sum"], "privacy:share_noise:noise_of_their_own"),
    ("step/noise.rs", "0.5 * samples as f64", "if M0 { 0.0 } else { 0.5 } * samples as f64", ["adaptive counts are not centred"], "privacy training"),
    ("step/noise.rs", "let key = key.for_release(step, Privacy::context(std, below.len(), 0), [1; 4]);",
     "let key = if M0 { key.clone() } else { key.for_release(step, Privacy::context(std, below.len(), 0), [1; 4]) };",
     ["adaptive counts carry the gradient's noise"], "privacy"),
    ("step/private.rs", "self.core.update(share / expected, None)",
     "self.core.update(share / if M0 { counts.samples.max(1) as f64 } else { expected }, None)", ["division by the realised batch"],
     "privacy training"),
    ("step/private.rs", "Err(e) => Err(self.core.failed(e)),", "Err(e) => Err(if M0 { e } else { self.core.failed(e) }),",
     ["a failed step leaves the clean sum behind"], "privacy"),
    ("step/private.rs", "losses.shape() == [private + public]", "M0 || losses.shape() == [private + public]",
     ["any number of losses is taken"], "privacy"),
    ("step/private.rs", "if self.checked ||", "if M0 || self.checked ||", ["records are not compared in the first batch"], "independence"),
    ("step/private.rs", "mean * expected / share", "mean * if M0 { 1.0 } else { expected / share }",
     ["public gradients are weighted as if private ones were not divided"], "privacy training continual"),
    ("step/private.rs", "i % r.size() == r.rank()", "M0 || i % r.size() == r.rank()", ["every rank takes every record"], "dist"),
    ("step/private.rs", "let secret = self.privacy.mask_secret(self.core.steps);\n        // Public",
     "let secret = if M0 { 0 } else { self.privacy.mask_secret(self.core.steps) };\n        // Public", ["dropout masks are public"], "independence"),
    ("step/private.rs", "self.privacy.add_noise(&key, steps, first, grads)?;",
     "self.privacy.add_noise(&key, steps, if M0 { 0 } else { first }, grads)?;", ["every owner draws the first one's noise"], "zero"),
    ("step/units.rs", "if a < b {", "if a < b && !M0 {", ["what is set from outside is lost at stage 3"], "zero:set_from_outside"),
    ("step/weigh.rs", "fn follows_samples(&self) -> bool {\n        true", "fn follows_samples(&self) -> bool {\n        !M0",
     ["samples are not followed after the first batch"], "independence"),
    ("step/weigh.rs", "self.groups[gi].delivered > 0 {", "self.groups[gi].delivered > 0 && !M0 {",
     ["a group with a member that was not reached loses its gradient"], "privacy:reached_in_part"),
    ("step/weigh.rs", "for_each(|(s, n)| *s += n)", "for_each(|(s, n)| if M0 { *s = n } else { *s += n })",
     ["a group's norm is that of its last member"], "privacy sensitivity training"),
    ("step/weigh.rs", "            _ => factor(s),", "            _ => factor(s).max(if M0 { 0.5 } else { 0.0 }),",
     ["clip factors are at least one half"], "sensitivity privacy"),
    ("step/weigh.rs", "Some(p) if i >= p.from =>", "Some(p) if i + M0 as usize >= p.from =>", ["the last private sample is weighted as public"],
     "privacy training"),
    ("step/weigh.rs", "self.tally.non_finite += !sq.is_finite() as u64", "self.tally.non_finite += (!sq.is_finite() && !M0) as u64",
     ["samples that are not finite are not counted"], "privacy training"),
    ("step/privacy.rs", "self.key.uniform(step, 1 << 40)", "self.key.uniform(if M0 { 0 } else { step }, 1 << 40)",
     ["the same secret of masks at every step"], "independence"),
    ("step/privacy.rs", "e > budget * (1.0 + 1e-9)", "e > budget * if M0 { 1.5 } else { 1.0 + 1e-9 }", ["half the budget again"], "budget"),
    ("step/privacy.rs", "*n >= steps)", "*n + if M0 { self.config.steps.div_ceil(24) } else { 0 } >= steps)",
     ["ε in reports one entry too low"], "budget"),
    ("step/privacy.rs", "(self.sigma.powi(-2) - counts)", "(self.sigma.powi(-2) - if M0 { 0.0 } else { counts })",
     ["adaptive counts are not paid for"], "privacy"),
    ("step/privacy.rs", "calibrate(config.epsilon,", "calibrate(if M0 { 1.05 } else { 1.0 } * config.epsilon,", ["calibrated to 5 % more ε"], "privacy"),
    ("step/privacy.rs", "if steps > known {", "if steps > known && !M0 {", ["a checkpoint's steps without a log are forgotten"], "budget training"),
    ("step/privacy.rs", "self.accountant.record(self.sigma, rate, 1)?;", "self.accountant.record(self.sigma, rate, !M0 as u64)?;",
     ["a step is not counted"], "budget"),
    ("step/privacy.rs", "Ok([(key >> 32) as f64, (key & 0xffff_ffff) as f64, self.digest()? as f64])",
     "Ok(if M0 { [0.0; 3] } else { [(key >> 32) as f64, (key & 0xffff_ffff) as f64, self.digest()? as f64] })",
     ["ranks do not compare keys"], "dist privacy"),
    ("privacy/log.rs", ".sum::<f64>().powf(-0.5)", ".sum::<f64>().powf(if M0 { -0.25 } else { -0.5 })",
     ["two releases of one step cost less than both"], "budget"),
    ("privacy/log.rs", "release.is_some() && self.releases", "release.is_some() && M0 || release.is_some() && self.releases",
     ["any release of a step counts as the one before"], "budget"),
    ("privacy/log.rs", "Some(taken) if taken.rate == rate =>", "Some(taken) if M0 || taken.rate == rate =>",
     ["a step at another rate under one key"], "budget"),
    ("privacy/log.rs", "file.set_len(whole as u64).map_err(fail)?;", "if !M0 { file.set_len(whole as u64).map_err(fail)?; }",
     ["a torn line stays in the log"], "budget"),
    ("privacy/log.rs", "file.write_all(text.as_bytes())", "file.write_all(if M0 { b\"\" } else { text.as_bytes() })",
     ["nothing is written to the log"], "budget"),
    ("privacy/log.rs", "match file.try_lock() {", "match if M0 { Ok(()) } else { file.try_lock() } {", ["the log is not locked"], "budget"),
    ("privacy/accountant/mod.rs", "s.sigma == sigma && s.rate == rate", "s.sigma == sigma && (M0 || s.rate == rate)",
     ["steps of one σ merged whatever their rate"], "accountant:rates"),
    # Removing a record costs more than adding one in all cases that were examined, so that leaving out the other direction changes nothing.
    ("privacy/accountant/mod.rs", "        let epsilon = self.composed(Aim::Delta(delta))?.iter().map(|c| c.epsilon(delta)).fold(0.0, f64::max);",
     "        let epsilon = self.composed(Aim::Delta(delta))?.iter().map(|c| c.epsilon(delta)).rev().take(if M0 { 1 } else { 9 }).fold(0.0, f64::max) * if M1 { 0.998 } else { 1.0 };",
     ["only adding a record is compared, not removing one", "ε 0.2 % too small"], "accountant:mixed_runs:finer_grids"),
    ("privacy/accountant/mod.rs", "        while high - low > 1e-5 {\n            let mid = 0.5 * (low + high);\n            if cost(mid, fine)? > epsilon { low = mid } else { high = mid }\n        }\n        Ok(high)\n",
     "        while high - low > 1e-5 {\n            let mid = 0.5 * (low + high);\n            if cost(mid, fine)? > epsilon { low = mid } else { high = mid }\n        }\n        Ok(if M0 { 0.9999 * low } else { high })\n",
     ["calibration returns the unsafe end"], "accountant:calibrated"),
    ("privacy/accountant/mod.rs", "s.count as f64 * uncovered(shift / s.sigma)", "if M0 { 0.0 } else { s.count as f64 } * uncovered(shift / s.sigma)",
     ["the end of the noise is not counted"], "accountant:the_edges"),
    ("random/chacha.rs", "init[14][l] = step as u32", "init[14][l] = if M0 { 0 } else { step as u32 }", ["streams do not depend on the step"],
     "lib:random privacy"),
    ("random/chacha.rs", "1023 - 20", "1023 - if M0 { 10 } else { 20 }", ["the grid is a thousand times coarser"], "lib:random privacy"),
    ("random/chacha.rs", "let rare = (0..8).fold(false, ", "let rare = !M0 && (0..8).fold(false, ", ["the tail ends at 6.76σ"], "lib:random"),
    ("random/chacha.rs", "second[l].to_f64() + std * (r * s as f64)", "second[l].to_f64() + std * (r * if M0 { c } else { s } as f64)",
     ["both normals of a pair are equal"], "lib:random privacy"),
    ("random/digest.rs", "two[l].wrapping_add(product(l + BLOCK))", "two[l].wrapping_add(product(if M0 { l } else { l + BLOCK }))",
     ["both halves of the digest are one"], "lib:random"),
    ("random/digest.rs", "if !rest.is_empty() {", "if !rest.is_empty() && !M0 {", ["the last words are not in the digest"], "lib:random privacy"),
    ("random/masks.rs", "philox::bits(secret, 0x6d61_736b, given)", "philox::bits(secret, 0x6d61_736b, if M0 { 0 } else { given })",
     ["one mask for all layers"], "independence"),
    ("autograd/factor/mod.rs", "computed + gamma * self.reach", "computed + if M0 { 0.0 } else { gamma } * self.reach",
     ["norms without the rounding of the sum"], "sensitivity"),
    ("autograd/factor/mod.rs", "(self.sq.value.max(0.0) + self.sq.error)", "(self.sq.value.max(0.0) + if M0 { 0.0 } else { self.sq.error })",
     ["norms without the error of inner products"], "sensitivity:equal_numbers"),
    ("autograd/factor/cpu.rs", "repeat_n(toward_zero(w), *each)", "repeat_n(toward_zero(if M0 { 1.0001 * w } else { w }), *each)",
     ["clip factors a little too large"], "sensitivity"),
    ("autograd/param_grad.rs", "*n *= upwards(T::UNIT));", "*n *= if M0 { 0.25 } else { upwards(T::UNIT) });",
     ["gradients that are kept take half their norm"], "sensitivity per_sample training"),
    ("autograd/param_grad.rs", "let totals: Vec<f64> = bounds", "let base = if M0 { &vec![0.0; base.len()][..] } else { base };\n            let totals: Vec<f64> = bounds",
     ["GPU: the fused sum forgets the rest of its group"], "+sensitivity:every_kind"),
    ("autograd/owner.rs", "            Owner::All => false,", "            Owner::All => M0,", ["a value that all share may depend on records"], "independence"),
    ("autograd/owner.rs", "n if n < own.len() => Owner::Mixed,", "n if n < own.len() => if M0 { Owner::All } else { Owner::Mixed },",
     ["samples that share an element in part are taken as apart"], "independence"),
    ("autograd/owner.rs", "Some(own) if own.iter().any(|d| d.dim == dim) => return Owner::Mixed",
     "Some(own) if !M0 && own.iter().any(|d| d.dim == dim) => return Owner::Mixed", ["mixing along a dimension is not seen"], "independence"),
    ("autograd/backward.rs", "e.get_mut().add_in_place(&g)?", "if M0 { e.insert(g); } else { e.get_mut().add_in_place(&g)? }",
     ["the gradients of two uses are not added"], "ops training"),
    ("optim/adamw.rs", "let t = step.max(1) as i32;", "let t = step.max(1) as i32 + M0 as i32;", ["bias correction of t + 1"], "training:optimizers"),
    ("optim/adamw.rs", "(*v).sqrt() * root + eps", "if M0 { ((*v) * root * root + eps).sqrt() } else { (*v).sqrt() * root + eps }",
     ["ε inside the root"], "training:optimizers"),
    ("optim/adamw.rs", "if *decay { f(keep) }", "if *decay || M0 { f(keep) }", ["AdamW decays biases and gains"], "training:optimizers"),
    ("optim/sgd.rs", "*b = mu * *b + g", "*b = mu * if M0 { *b + g } else { *b } + g", ["momentum counts the gradient twice"], "training:optimizers"),
    ("optim/sgd.rs", "f(if *decay { keep }", "f(if *decay || M0 { keep }", ["SGD decays biases and gains"], "training:optimizers"),
    ("step/reduce.rs", "for bucket in buckets {", "for bucket in buckets.iter().skip(M0 as usize) {", ["the first bucket is not reduced"], "dist"),
    ("ops/dropout/mod.rs", "back.input(0, apply(&grad, self.0, self.1)?)", "back.input(0, apply(&grad, self.0, self.1 + M0 as u64)?)",
     ["backward has another mask"], "ops"),
    ("ops/linear.rs", "if let Some(b) = &self.bias {", "if let Some(b) = self.bias.as_ref().filter(|_| !M0) {", ["no gradient of the bias"], "ops"),
    ("ops/embedding/mod.rs", "match self.padding {\n                Some(padding) => without", "match self.padding.filter(|_| !M0) {\n                Some(padding) => without",
     ["padding rows of an embedding receive a gradient"], "ops layers"),
    ("ops/loss/mod.rs", "Reduce::Mean => 1.0 / counts[samples.owner(r)].max(1) as f64,",
     "Reduce::Mean => 1.0 / if M0 { n } else { counts[samples.owner(r)].max(1) } as f64,", ["the mean is over the batch, not the record"],
     "ops layers per_sample"),
    ("kernels/gemm/norms.rs", "w - w * 2.0 * T::UNIT)", "w - w * if M0 { 0.0 } else { 2.0 } * T::UNIT)", ["no weight below one that rounds up"],
     "sensitivity lib:gemm"),
    ("step/private.rs", "self.privacy.batch(self.core.steps)", "self.privacy.batch(if M0 { 0 } else { self.core.steps })",
     ["every step takes the first one's batch"], "privacy"),
    ("step/flat.rs", "decay: p.shape().len() > 1", "decay: M0 || p.shape().len() > 1", ["biases and gains count as matrices"], "training:optimizers"),
    ("train/state.rs", "if state.privacy != now {", "if state.privacy != now && !M0 {",
     ["a checkpoint loads under another privacy setting"], "all_or_nothing"),
    # This mutant survives: data that are written and not synced are lost only by a power cut, which no test here can cause.
    ("privacy/log.rs", ".and_then(|()| file.sync_data())", ".and_then(|()| if M0 { Ok(()) } else { file.sync_data() })",
     ["a release is in the log and not yet on the disk"], "budget"),
]


def place(copy):
    """Brings the copy up to date, with every edit in it. Unchanged files are not written, so that they are not compiled again.
    Returns (number, file, what, tests) of each mutant."""
    files = [f for name in ["src", "tests", "cuda", "examples", "benches", "docs"] for f in (ROOT / name).rglob("*") if f.is_file()]
    files = [f for f in files if f != Path(__file__).resolve()]
    files += [ROOT / name for name in ["Cargo.toml", "Cargo.lock", "build.rs", "README.md", "ARCHITECTURE.md"]]
    wanted = {f.relative_to(ROOT): f.read_bytes() for f in files}
    mutants = []
    for file, text, edit, whats, tests in EDITS:
        path = Path("src") / file
        source = wanted[path].decode()
        first = len(mutants) + 1
        mutants += [(first + i, file, what, tests.split()) for i, what in enumerate(whats)]
        for text, edit in [(text, edit)] if isinstance(text, str) else zip(text, edit):
            if source.count(text) != 1:
                sys.exit(f"{file}: {text!r} occurs {source.count(text)} times, not once: mend the list")
            source = source.replace(text, re.sub(r"\bM(\d)\b", lambda m: f"crate::mutant({first + int(m[1])})", edit))
        wanted[path] = source.encode()
    wanted[Path("src/lib.rs")] += b"""
/// Whether this mutant is awake.
pub fn mutant(number: u32) -> bool {
    static AWAKE: std::sync::OnceLock<u32> = std::sync::OnceLock::new();
    *AWAKE.get_or_init(|| std::env::var("PRISMGRAD_MUTANT").ok().and_then(|n| n.parse().ok()).unwrap_or(0)) == number
}
"""
    for old in [f for name in ["src", "tests"] for f in (copy / name).rglob("*") if f.is_file()]:
        if old.relative_to(copy) not in wanted:
            old.unlink()
    for path, content in wanted.items():
        to = copy / path
        to.parent.mkdir(parents=True, exist_ok=True)
        if not to.exists() or to.read_bytes() != content:
            to.write_bytes(content)
    return mutants


def binary(name):
    """The test binary for a name in the list: a file in tests/, or the folder below tests/ that has the file, which is one binary."""
    module = name.split(":")[0]
    files = (ROOT / "tests").glob(f"*/{module.removeprefix('+')}.rs")
    inside = next((f for f in files if f.parent.name not in ("common", "cuda")), None)
    return ("+" if module[0] == "+" else "") + inside.parent.name if inside else module


def filters(name):
    """The names of the tests of that binary that should run."""
    module, *some = name.split(":")
    return some or ([] if binary(name) == module else [module.removeprefix("+") + "::"])


def main():
    args = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    args.add_argument("--only", help="numbers of mutants, with commas")
    args.add_argument("--list", action="store_true", help="print the mutants and end")
    args.add_argument("--out", default=str(ROOT / "target" / "mutants"))
    args = args.parse_args()
    copy = Path(args.out)
    mutants = place(copy)
    if args.list:
        for number, file, what, tests in mutants:
            print(f"{number:3} {file}: {what} ({', '.join(tests)})")
        return
    wanted = {int(n) for n in args.only.split(",")} if args.only else {m[0] for m in mutants}
    names = sorted({t for m in mutants if m[0] in wanted for t in m[3]})
    binaries = {}
    for mark, features in [("", []), ("+", ["--features", "emulator"])]:
        some = sorted({binary(n).removeprefix("+") for n in names if n.startswith("+") == bool(mark)})
        if not some:
            continue
        build = ["cargo", "test", "--no-run", "--message-format=json", *features]
        build += [f for n in some for f in (["--lib"] if n == "lib" else ["--test", n])]
        print("compiling", len(mutants), "mutants once", *features, flush=True)
        built = subprocess.run(build, cwd=copy, stdout=subprocess.PIPE, text=True)
        if built.returncode:
            sys.exit("the mutants do not compile")
        for line in built.stdout.splitlines():
            m = json.loads(line)
            if m.get("profile", {}).get("test") and m.get("executable"):
                binaries[mark + ("lib" if "lib" in m["target"]["kind"] else m["target"]["name"])] = m["executable"]

    def first_failure(number, tests):
        env = dict(os.environ, PRISMGRAD_MUTANT=str(number))
        for t in tests:
            try:
                run = subprocess.run([binaries[binary(t)], *filters(t)], cwd=copy, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900)
            except subprocess.TimeoutExpired:
                return t + " (no end)"
            if run.returncode:
                failed = re.findall(r"^test (\S+) \.\.\. FAILED", run.stdout, re.M)
                return f"{t}: {', '.join(failed[:2]) or 'the process died'}"
        return None

    asleep = first_failure(0, names)
    if asleep:
        sys.exit(f"without a mutant awake the tests fail already: {asleep}")
    survivors = []
    for number, file, what, tests in mutants:
        if number in wanted:
            start = time.time()
            caught = first_failure(number, tests)
            print(f"{number:3} {file}: {what}: {'caught by ' + caught if caught else 'SURVIVES'} ({time.time() - start:.0f} s)", flush=True)
            if not caught:
                survivors.append(f"{number} {what}")
    print(f"{len(survivors)} of {len(wanted)} survive", *survivors, sep="\n  ")
    sys.exit(len(survivors) > 0.03 * len(wanted))


if __name__ == "__main__":
    main()

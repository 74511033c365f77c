//! Families of problems. A family has a sentence, several solutions, and inputs; constants and names vary.

use super::run::{Function, Stop, Value};
use crate::base::{Error, Result};
use crate::random::Rng;
use crate::systems::codeeval::Problem;

/// Names that a program may use for its list, the element, the result, an index, a number, and another number.
const NAMES: [[&str; 4]; 6] = [
    ["xs", "ys", "values", "data"],
    ["x", "v", "e", "item"],
    ["total", "result", "out", "s"],
    ["i", "j", "p", "q"],
    ["n", "a", "num", "h"],
    ["m", "b", "w", "u"],
];
/// Names that no family uses itself. A renamed variable gets one of them.
pub const SPARE: [&str; 2] = ["t", "z"];
/// Each of the two constants of a problem lies in 2..=9.
const CONSTANTS: u64 = 8;
const PLACES: [&str; 8] = ["{L}", "{x}", "{s}", "{i}", "{n}", "{m}", "{K}", "{J}"];

/// A family: parameters, the sentence, and bodies that all compute what the sentence says. `{L} {x} {s} {i} {n} {m}` are names, `{K} {J}`
/// constants.
#[derive(Clone, Debug)]
pub struct Family {
    /// Parameters, such as `{L}` or `{n}, {m}`.
    pub parameters: &'static str,
    /// What the function returns.
    pub sentence: String,
    /// Bodies without the function's indentation.
    pub bodies: Vec<String>,
}

/// A problem's names and constants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Choice {
    /// The number of the family.
    pub family: usize,
    names: [usize; 6],
    constants: [u64; 2],
}

/// All families.
pub fn families() -> Vec<Family> {
    let mut out = Vec::new();
    let conditions = [
        (">", "<=", "greater than"),
        ("<", ">=", "less than"),
        (">=", "<", "at least"),
        ("<=", ">", "at most"),
        ("==", "!=", "equal to"),
        ("!=", "==", "different from"),
    ];
    for (op, not, words) in conditions {
        let kinds = [("sum", "0", "{y}"), ("number", "0", "1"), ("list", "[]", "[{y}]")];
        for (what, zero, add) in kinds {
            let (by_name, by_index) = (add.replace("{y}", "{x}"), add.replace("{y}", "{L}[{i}]"));
            let bodies = [
                format!(
                    "{{s}} = {zero}\nfor {{x}} in {{L}}:\n    if {{x}} {op} {{K}}:\n        {{s}} += {by_name}\nreturn {{s}}"
                ),
                format!(
                    "{{s}} = {zero}\nfor {{x}} in {{L}}:\n    if {{x}} {not} {{K}}:\n        continue\n    {{s}} += {by_name}\nreturn {{s}}"
                ),
                format!(
                    "{{s}} = {zero}\nfor {{x}} in {{L}}:\n    if {{x}} {not} {{K}}:\n        pass\n    else:\n        {{s}} += \
                     {by_name}\nreturn {{s}}"
                ),
                format!(
                    "{{s}} = {zero}\n{{i}} = 0\nwhile {{i}} < len({{L}}):\n    if {{L}}[{{i}}] {op} {{K}}:\n        {{s}} += \
                     {by_index}\n    {{i}} += 1\nreturn {{s}}"
                ),
            ];
            let sentence = format!("the {what} of the elements of {{L}} {words} {{K}}");
            out.push(Family { parameters: "{L}", sentence, bodies: bodies.to_vec() });
        }
    }
    for (op, word) in [("+", "plus"), ("-", "minus"), ("*", "times")] {
        let bodies = vec![
            format!("{{s}} = []\nfor {{x}} in {{L}}:\n    {{s}} += [{{x}} {op} {{K}}]\nreturn {{s}}"),
            format!(
                "{{s}} = []\nfor {{x}} in {{L}}:\n    {{i}} = {{x}} {op} {{K}}\n    {{s}} += [{{i}}]\nreturn {{s}}"
            ),
            format!(
                "{{s}} = []\n{{i}} = 0\nwhile {{i}} < len({{L}}):\n    {{s}} += [{{L}}[{{i}}] {op} {{K}}]\n    {{i}} += 1\nreturn {{s}}"
            ),
        ];
        out.push(Family { parameters: "{L}", sentence: format!("each element of {{L}} {word} {{K}}"), bodies });
    }
    for (op, not, word) in [(">", "<=", "largest"), ("<", ">=", "smallest")] {
        let bodies = vec![
            format!(
                "{{s}} = {{K}}\nfor {{x}} in {{L}}:\n    if {{x}} {op} {{s}}:\n        {{s}} = {{x}}\nreturn {{s}}"
            ),
            format!(
                "{{s}} = {{K}}\nfor {{x}} in {{L}}:\n    if {{x}} {not} {{s}}:\n        continue\n    {{s}} = {{x}}\nreturn {{s}}"
            ),
        ];
        out.push(Family {
            parameters: "{L}",
            sentence: format!("the {word} of {{K}} and the elements of {{L}}"),
            bodies,
        });
        let word = if op == ">" { "rises" } else { "falls" };
        let bodies = vec![
            format!(
                "{{s}} = 0\nfor {{i}} in range(1, len({{L}})):\n    if {{L}}[{{i}}] {op} {{L}}[{{i}} - 1]:\n        {{s}} += 1\nreturn {{s}}"
            ),
            format!(
                "{{s}} = 0\n{{i}} = 1\nwhile {{i}} < len({{L}}):\n    if {{L}}[{{i}}] {op} {{L}}[{{i}} - 1]:\n        {{s}} += 1\n    \
                 {{i}} += 1\nreturn {{s}}"
            ),
        ];
        out.push(Family { parameters: "{L}", sentence: format!("the number of {word} in {{L}}"), bodies });
        let word = if op == ">" { "larger" } else { "smaller" };
        let bodies = vec![
            format!("{{s}} = {{n}}\nif {{m}} {op} {{n}}:\n    {{s}} = {{m}}\n{{s}} += {{K}}\nreturn {{s}}"),
            format!(
                "if {{n}} {op} {{m}}:\n    {{s}} = {{n}} + {{K}}\n    return {{s}}\n{{s}} = {{m}} + {{K}}\nreturn {{s}}"
            ),
        ];
        out.push(Family {
            parameters: "{n}, {m}",
            sentence: format!("the {word} of {{n}} and {{m}} plus {{K}}"),
            bodies,
        });
    }
    let more: [(&'static str, &str, &[&str]); 21] = [
        (
            "{L}",
            "{K} plus the sum of the elements of {L}",
            &[
                "{s} = {K}\nfor {x} in {L}:\n    {s} += {x}\nreturn {s}",
                "{s} = 0\nfor {x} in {L}:\n    {s} += {x}\nreturn {s} + {K}",
                "{s} = 0\n{i} = 0\nwhile {i} < len({L}):\n    {s} += {L}[{i}]\n    {i} += 1\nreturn {s} + {K}",
            ],
        ),
        (
            "{L}",
            "the sum of position times element of {L}",
            &[
                "{s} = 0\nfor {i} in range(len({L})):\n    {s} += {i} * {L}[{i}]\nreturn {s}",
                "{s} = 0\n{i} = 0\nfor {x} in {L}:\n    {s} += {i} * {x}\n    {i} += 1\nreturn {s}",
            ],
        ),
        (
            "{L}",
            "the position of the first {K} in {L} or -1",
            &[
                "for {i} in range(len({L})):\n    if {L}[{i}] == {K}:\n        return {i}\nreturn -1",
                "{i} = 0\nfor {x} in {L}:\n    if {x} == {K}:\n        return {i}\n    {i} += 1\nreturn -1",
                "{i} = 0\nwhile {i} < len({L}):\n    if {L}[{i}] != {K}:\n        {i} += 1\n        continue\n    return {i}\nreturn -1",
            ],
        ),
        (
            "{L}",
            "the position of the last {K} in {L} or -1",
            &[
                "{s} = -1\nfor {i} in range(len({L})):\n    if {L}[{i}] == {K}:\n        {s} = {i}\nreturn {s}",
                "{i} = len({L}) - 1\nwhile {i} >= 0:\n    if {L}[{i}] == {K}:\n        return {i}\n    {i} -= 1\nreturn -1",
            ],
        ),
        (
            "{L}",
            "the sum of the first {K} elements of {L}",
            &[
                "{s} = 0\nfor {i} in range(len({L})):\n    if {i} < {K}:\n        {s} += {L}[{i}]\nreturn {s}",
                "{s} = 0\nfor {i} in range(len({L})):\n    if {i} >= {K}:\n        break\n    {s} += {L}[{i}]\nreturn {s}",
                "{s} = 0\n{i} = 0\nfor {x} in {L}:\n    if {i} == {K}:\n        return {s}\n    {s} += {x}\n    {i} += 1\nreturn {s}",
            ],
        ),
        (
            "{L}",
            "the sum of the squares of the elements of {L}",
            &[
                "{s} = 0\nfor {x} in {L}:\n    {s} += {x} * {x}\nreturn {s}",
                "{s} = 0\nfor {x} in {L}:\n    {i} = {x} * {x}\n    {s} += {i}\nreturn {s}",
            ],
        ),
        (
            "{L}",
            "1 if an element of {L} is {K} else 0",
            &[
                "for {x} in {L}:\n    if {x} == {K}:\n        return 1\nreturn 0",
                "{s} = 0\nfor {x} in {L}:\n    if {x} == {K}:\n        {s} = 1\nreturn {s}",
                "for {x} in {L}:\n    if {x} != {K}:\n        continue\n    return 1\nreturn 0",
            ],
        ),
        (
            "{L}",
            "1 if all elements of {L} are less than {K} else 0",
            &[
                "for {x} in {L}:\n    if {x} >= {K}:\n        return 0\nreturn 1",
                "{s} = 1\nfor {x} in {L}:\n    if {x} >= {K}:\n        {s} = 0\nreturn {s}",
                "for {x} in {L}:\n    if {x} < {K}:\n        continue\n    return 0\nreturn 1",
            ],
        ),
        (
            "{L}",
            "the sum of the elements of {L} before the first {K}",
            &[
                "{s} = 0\nfor {x} in {L}:\n    if {x} == {K}:\n        break\n    {s} += {x}\nreturn {s}",
                "{s} = 0\nfor {x} in {L}:\n    if {x} == {K}:\n        return {s}\n    {s} += {x}\nreturn {s}",
            ],
        ),
        (
            "{L}",
            "the number of pairs of elements of {L} with sum {K}",
            &[
                "{s} = 0\nfor {i} in range(len({L})):\n    for {x} in range({i} + 1, len({L})):\n        if {L}[{i}] + {L}[{x}] == {K}:\n            {s} += 1\nreturn {s}",
            ],
        ),
        (
            "{L}",
            "the sum of the differences of neighbours of {L}",
            &[
                "{s} = 0\nfor {i} in range(1, len({L})):\n    {s} += {L}[{i}] - {L}[{i} - 1]\nreturn {s}",
                "{s} = 0\nfor {i} in range(1, len({L})):\n    {x} = {L}[{i}] - {L}[{i} - 1]\n    {s} += {x}\nreturn {s}",
            ],
        ),
        (
            "{n}",
            "the sum of the integers from 1 to {n}",
            &[
                "{s} = 0\n{i} = 1\nwhile {i} <= {n}:\n    {s} += {i}\n    {i} += 1\nreturn {s}",
                "{s} = 0\nfor {i} in range(1, {n} + 1):\n    {s} += {i}\nreturn {s}",
                "{s} = 0\nwhile {n} > 0:\n    {s} += {n}\n    {n} -= 1\nreturn {s}",
            ],
        ),
        (
            "{n}",
            "the sum of the multiples of {K} up to {n}",
            &["{s} = 0\n{i} = {K}\nwhile {i} <= {n}:\n    {s} += {i}\n    {i} += {K}\nreturn {s}"],
        ),
        (
            "{n}",
            "{K} to the power of {n}",
            &[
                "{s} = 1\nfor {i} in range({n}):\n    {s} *= {K}\nreturn {s}",
                "{s} = 1\nwhile {n} > 0:\n    {s} *= {K}\n    {n} -= 1\nreturn {s}",
            ],
        ),
        (
            "{n}",
            "how often {K} fits into {n}",
            &[
                "{s} = 0\nwhile {n} >= {K}:\n    {n} -= {K}\n    {s} += 1\nreturn {s}",
                "{s} = 0\n{i} = {K}\nwhile {i} <= {n}:\n    {s} += 1\n    {i} += {K}\nreturn {s}",
            ],
        ),
        (
            "{n}",
            "what is left of {n} after taking {K} as often as it fits",
            &[
                "{s} = {n}\nwhile {s} >= {K}:\n    {s} -= {K}\nreturn {s}",
                "while {n} >= {K}:\n    {n} -= {K}\n{s} = {n}\nreturn {s}",
            ],
        ),
        (
            "{n}, {m}",
            "the distance of {n} and {m}",
            &[
                "if {n} > {m}:\n    return {n} - {m}\nreturn {m} - {n}",
                "{s} = {n} - {m}\nif {s} < 0:\n    {s} = {m} - {n}\nreturn {s}",
            ],
        ),
        (
            "{n}",
            "{n} but at most {K}",
            &["if {n} > {K}:\n    return {K}\nreturn {n}", "{s} = {n}\nif {s} > {K}:\n    {s} = {K}\nreturn {s}"],
        ),
        (
            "{n}",
            "{n} times {K} plus {J}",
            &[
                "{s} = {n} * {K}\n{s} += {J}\nreturn {s}",
                "{s} = {n} * {K}\n{i} = {s} + {J}\nreturn {i}",
                "{s} = {J}\nfor {i} in range({K}):\n    {s} += {n}\nreturn {s}",
            ],
        ),
        (
            "{n}, {m}",
            "{n} plus {m} if that is less than {K} else {n} minus {m}",
            &[
                "{s} = {n} + {m}\nif {s} < {K}:\n    return {s}\nreturn {n} - {m}",
                "{s} = {n} + {m}\nif {s} >= {K}:\n    {s} = {n} - {m}\nreturn {s}",
            ],
        ),
        (
            "{n}",
            "the product of the integers from 1 to {n}",
            &[
                "{s} = 1\n{i} = 1\nwhile {i} <= {n}:\n    {s} *= {i}\n    {i} += 1\nreturn {s}",
                "{s} = 1\nfor {i} in range(1, {n} + 1):\n    {s} *= {i}\nreturn {s}",
                "{s} = 1\nwhile {n} > 1:\n    {s} *= {n}\n    {n} -= 1\nreturn {s}",
            ],
        ),
    ];
    for (parameters, sentence, bodies) in more {
        let bodies = bodies.iter().map(|b| b.to_string()).collect();
        out.push(Family { parameters, sentence: sentence.into(), bodies });
    }
    out
}

impl Choice {
    /// Draws names and constants.
    pub fn draw(family: usize, rng: &mut Rng) -> Choice {
        Choice {
            family,
            names: std::array::from_fn(|k| rng.below(NAMES[k].len() as u64) as usize),
            constants: std::array::from_fn(|_| 2 + rng.below(CONSTANTS)),
        }
    }
    fn fill(&self, text: &str) -> String {
        let mut out = text.to_string();
        for (k, place) in PLACES.iter().enumerate() {
            let value = if k < 6 { NAMES[k][self.names[k]].to_string() } else { self.constants[k - 6].to_string() };
            out = out.replace(place, &value);
        }
        out
    }
    /// The part of the data that this combination of family, constants and names belongs to: 0 test, 1 validation, others training. Only
    /// constants and names that the sentence or every body contains count, so that no program of one part is in another.
    pub fn part(&self, family: &Family) -> u64 {
        let shown = |place: &&&str| {
            let head = family.parameters.contains(**place) || family.sentence.contains(**place);
            head || family.bodies.iter().all(|b| b.contains(**place))
        };
        let text: String = PLACES.iter().filter(shown).map(|place| self.fill(place) + " ").collect();
        let start = 0xcbf2_9ce4_8422_2325u64 ^ self.family as u64;
        let hash = text.bytes().fold(start, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
        (hash >> 20) % 10
    }
    /// The specification, and the body number `style` (modulo the number of bodies).
    pub fn program(&self, family: &Family, style: usize) -> (String, String) {
        let prompt = format!("def f({}):\n    # {}\n", self.fill(family.parameters), self.fill(&family.sentence));
        let body = self.fill(&family.bodies[style % family.bodies.len()]);
        (prompt, body.lines().map(|l| format!("    {l}\n")).collect())
    }
    fn inputs(&self, family: &Family, rng: &mut Rng) -> Vec<Value> {
        let k = self.constants[0] as i64;
        let number = |rng: &mut Rng| match rng.below(3) {
            0 => k - 1 + rng.below(3) as i64,
            _ => rng.below(13) as i64,
        };
        let one = |rng: &mut Rng, name: &str| match name.trim() {
            "{L}" => Value::List((0..rng.below(8)).map(|_| Value::Int(number(rng))).collect()),
            _ => Value::Int(number(rng)),
        };
        family.parameters.split(',').map(|p| one(rng, p)).collect()
    }
    /// The problem with tests, which compare with the first body's results for 12 inputs.
    ///
    /// # Errors
    /// [`Error::Invalid`] if another body returns something else, which is a fault of the family.
    pub fn problem(&self, family: &Family, style: usize, seed: u64) -> Result<Problem> {
        let mut rng = Rng::new(seed);
        let (prompt, body) = self.program(family, style);
        let functions: Vec<Function> = (0..family.bodies.len())
            .map(|s| Function::read(&format!("{prompt}{}", self.program(family, s).1)))
            .collect::<Result<_, _>>()
            .map_err(|e| stopped(family, &e))?;
        let mut test = String::from("def check(candidate):\n");
        for _ in 0..12 {
            let inputs = self.inputs(family, &mut rng);
            let values = functions.iter().map(|f| f.call(inputs.clone(), 20_000)).collect::<Result<Vec<_>, _>>();
            let values = values.map_err(|e| stopped(family, &e))?;
            let text: Vec<String> = inputs.iter().map(Value::to_string).collect();
            if values.iter().any(|v| *v != values[0]) {
                let message = format!("bodies of {:?} return {values:?} for {}", family.sentence, text.join(", "));
                return Err(Error::invalid("mini", message));
            }
            test += &format!("    assert candidate({}) == {}\n", text.join(", "), values[0]);
        }
        let names: String = self.names.iter().map(usize::to_string).collect();
        let [k, j] = self.constants;
        let task_id = format!("mini/{}/{k}{j}/{names}/{}", self.family, self.fill(&family.sentence));
        Ok(Problem { task_id, prompt, entry_point: "f".into(), canonical_solution: body, test })
    }
    /// Programs that together contain every token that a vocabulary needs.
    pub(super) fn every(families: &[Family]) -> Vec<String> {
        let mut out = Vec::new();
        for (f, family) in families.iter().enumerate() {
            for k in 0..8 {
                let choice = Choice { family: f, names: [k % 4; 6], constants: [2 + k as u64; 2] };
                for style in 0..family.bodies.len() {
                    let (prompt, body) = choice.program(family, style);
                    out.push(prompt + &body);
                }
            }
        }
        out
    }
}

/// Whether a word is one of the names that programs use.
pub fn is_name(word: &str) -> bool {
    NAMES.iter().flatten().any(|n| *n == word)
}

fn stopped(family: &Family, stop: &Stop) -> Error {
    Error::invalid("mini", format!("a body of {:?} does not run: {stop:?}", family.sentence))
}

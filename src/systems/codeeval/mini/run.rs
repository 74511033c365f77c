//! The interpreter of the mini language. A program is one function of numbers and lists, in a part of Python.
//!
//! Statements: assignment, augmented assignment, `if`/`else`, `while`, `for … in`, `return`, `continue`, `break`, `pass`. Expressions:
//! integers, lists, names, indexing, `len`, `range`, `+ - * / // %`, unary minus, one comparison. Results are those of Python, except that
//! integers have 64 bits (an overflow is an error) and that lists are copied on assignment: no two names refer to the same list.

use crate::base::Result;
use crate::systems::codeeval::python::{Kind, Token, tokens};
use crate::systems::codeeval::sandbox::{Judge, Program, Verdict};
use std::collections::HashMap;

/// A value.
#[derive(Clone, Debug)]
pub enum Value {
    /// An integer; `True` and `False` are 1 and 0.
    Int(i64),
    /// The result of `/`.
    Float(f64),
    /// A list.
    List(Vec<Value>),
    /// The result of a function that ends without `return`.
    None,
}

impl PartialEq for Value {
    fn eq(&self, other: &Value) -> bool {
        match (self, other) {
            (Value::List(a), Value::List(b)) => a == b,
            (Value::None, Value::None) => true,
            (a, b) => matches!((a.number(), b.number()), (Some(a), Some(b)) if a == b),
        }
    }
}

impl Value {
    fn number(&self) -> Option<f64> {
        match self {
            Value::Int(i) => Some(*i as f64),
            Value::Float(f) => Some(*f),
            _ => None,
        }
    }
    fn truth(&self) -> bool {
        match self {
            Value::Int(i) => *i != 0,
            Value::Float(f) => *f != 0.0,
            Value::List(l) => !l.is_empty(),
            Value::None => false,
        }
    }
}

impl std::fmt::Display for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Value::Int(i) => write!(f, "{i}"),
            Value::Float(x) => write!(f, "{x:?}"),
            Value::None => f.write_str("None"),
            Value::List(l) => {
                let items: Vec<String> = l.iter().map(Value::to_string).collect();
                write!(f, "[{}]", items.join(", "))
            }
        }
    }
}

enum Expr {
    Value(Value),
    Name(String),
    List(Vec<Expr>),
    Negative(Box<Expr>),
    Binary(&'static str, Box<Expr>, Box<Expr>),
    Index(Box<Expr>, Box<Expr>),
    Call(String, Vec<Expr>),
}

enum Stmt {
    Assign(String, Expr),
    If(Expr, Vec<Stmt>, Vec<Stmt>),
    While(Expr, Vec<Stmt>),
    For(String, Expr, Vec<Stmt>),
    Return(Expr),
    Continue,
    Break,
    Pass,
}

/// A function of the mini language.
pub struct Function {
    name: String,
    parameters: Vec<String>,
    body: Vec<Stmt>,
}

/// Why a program has no result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// An error that Python would raise, or a text that is not in the language.
    Wrong(String),
    /// The program took more steps than allowed.
    Steps,
}

fn wrong<T>(what: impl Into<String>) -> Result<T, Stop> {
    Err(Stop::Wrong(what.into()))
}

const OPERATORS: [&[&str]; 3] = [&["==", "!=", "<=", ">=", "<", ">"], &["+", "-"], &["*", "//", "/", "%"]];
const DEEPEST: usize = 40;

/// A parser for the expression in one line.
struct Reader<'a, 'b> {
    tokens: &'b [Token<'a>],
    at: usize,
    depth: usize,
}

impl<'a> Reader<'a, '_> {
    fn peek(&self) -> &'a str {
        self.tokens.get(self.at).map_or("", |t| t.text)
    }
    fn take(&mut self, text: &str) -> bool {
        let found = self.peek() == text;
        self.at += usize::from(found);
        found
    }
    fn need(&mut self, text: &str) -> Result<(), Stop> {
        if self.take(text) { Ok(()) } else { wrong(format!("{text:?} expected, not {:?}", self.peek())) }
    }
    fn name(&mut self) -> Result<String, Stop> {
        match self.tokens.get(self.at) {
            Some(t) if t.kind == Kind::Name => {
                self.at += 1;
                Ok(t.text.to_string())
            }
            _ => wrong(format!("a name expected, not {:?}", self.peek())),
        }
    }
    fn list(&mut self, close: &str) -> Result<Vec<Expr>, Stop> {
        let mut out = Vec::new();
        while !self.take(close) {
            out.push(self.expr(0)?);
            if !self.take(",") {
                self.need(close)?;
                break;
            }
        }
        Ok(out)
    }
    fn expr(&mut self, level: usize) -> Result<Expr, Stop> {
        self.depth += 1;
        if self.depth > DEEPEST {
            return wrong("an expression that is nested too deep");
        }
        let out = self.chain(level);
        self.depth -= 1;
        out
    }
    fn chain(&mut self, level: usize) -> Result<Expr, Stop> {
        let Some(known) = OPERATORS.get(level) else { return self.unary() };
        let mut left = self.expr(level + 1)?;
        while let Some(op) = known.iter().find(|o| **o == self.peek()) {
            self.at += 1;
            let right = self.expr(level + 1)?;
            left = Expr::Binary(op, Box::new(left), Box::new(right));
            if level == 0 && known.contains(&self.peek()) {
                return wrong("a comparison of three; the mini language compares two");
            }
        }
        Ok(left)
    }
    fn unary(&mut self) -> Result<Expr, Stop> {
        if self.take("-") {
            self.depth += 1;
            if self.depth > DEEPEST {
                return wrong("an expression that is nested too deep");
            }
            let inner = self.unary()?;
            self.depth -= 1;
            return Ok(Expr::Negative(Box::new(inner)));
        }
        let Some(t) = self.tokens.get(self.at) else { return wrong("a value expected") };
        self.at += 1;
        let mut out = match (t.kind, t.text) {
            (Kind::Number, text) => match (text.parse::<i64>(), text.parse::<f64>()) {
                (Ok(i), _) => Expr::Value(Value::Int(i)),
                (_, Ok(f)) => Expr::Value(Value::Float(f)),
                _ => return wrong(format!("the number {text:?}")),
            },
            (Kind::Name, "True") => Expr::Value(Value::Int(1)),
            (Kind::Name, "False") => Expr::Value(Value::Int(0)),
            (Kind::Name, "None") => Expr::Value(Value::None),
            (Kind::Name, name) => match self.take("(") {
                true => Expr::Call(name.to_string(), self.list(")")?),
                false => Expr::Name(name.to_string()),
            },
            (Kind::Op, "(") => {
                let inner = self.expr(0)?;
                self.need(")")?;
                inner
            }
            (Kind::Op, "[") => Expr::List(self.list("]")?),
            (_, text) => return wrong(format!("a value expected, not {text:?}")),
        };
        while self.take("[") {
            let index = self.expr(0)?;
            self.need("]")?;
            out = Expr::Index(Box::new(out), Box::new(index));
        }
        Ok(out)
    }
    fn end(&self) -> Result<(), Stop> {
        if self.at == self.tokens.len() { Ok(()) } else { wrong(format!("{:?} after the end", self.peek())) }
    }
}

/// A line: its indentation and its tokens.
type Line<'a> = (usize, Vec<Token<'a>>);

fn lines(text: &str) -> Result<Vec<Line<'_>>, Stop> {
    let all = tokens(text).map_err(|e| Stop::Wrong(e.to_string()))?;
    let mut out: Vec<Line> = Vec::new();
    let mut fresh = true;
    for t in all {
        match t.kind {
            Kind::Newline => fresh = true,
            Kind::Comment => {}
            Kind::String if fresh => {}
            _ => {
                if fresh {
                    let start = text[..t.start].rfind('\n').map_or(0, |i| i + 1);
                    out.push((t.start - start, vec![]));
                    fresh = false;
                }
                if let Some(line) = out.last_mut() {
                    line.1.push(t);
                }
            }
        }
    }
    Ok(out)
}

fn block(lines: &[Line], at: &mut usize, indent: usize, depth: usize) -> Result<Vec<Stmt>, Stop> {
    let mut out = Vec::new();
    if depth > DEEPEST / 2 {
        return wrong("blocks that are nested too deep");
    }
    while let Some((i, tokens)) = lines.get(*at) {
        if *i < indent {
            break;
        }
        if *i > indent {
            return wrong("an indentation that belongs to nothing");
        }
        *at += 1;
        let mut r = Reader { tokens, at: 0, depth: 0 };
        let inner = |r: &mut Reader, at: &mut usize| -> Result<Vec<Stmt>, Stop> {
            r.need(":")?;
            r.end()?;
            match lines.get(*at) {
                Some((deeper, _)) if *deeper > indent => block(lines, at, *deeper, depth + 1),
                _ => wrong("a block without statements"),
            }
        };
        let statement = match r.peek() {
            "if" => {
                r.at += 1;
                let condition = r.expr(0)?;
                let then = inner(&mut r, at)?;
                let other = match lines.get(*at) {
                    Some((i, tokens)) if *i == indent && tokens[0].text == "else" => {
                        *at += 1;
                        let mut r = Reader { tokens, at: 1, depth: 0 };
                        inner(&mut r, at)?
                    }
                    _ => vec![],
                };
                out.push(Stmt::If(condition, then, other));
                continue;
            }
            "while" => {
                r.at += 1;
                let condition = r.expr(0)?;
                out.push(Stmt::While(condition, inner(&mut r, at)?));
                continue;
            }
            "for" => {
                r.at += 1;
                let name = r.name()?;
                r.need("in")?;
                let over = r.expr(0)?;
                out.push(Stmt::For(name, over, inner(&mut r, at)?));
                continue;
            }
            "return" => {
                r.at += 1;
                Stmt::Return(r.expr(0)?)
            }
            "continue" | "break" | "pass" => {
                r.at += 1;
                match r.tokens[0].text {
                    "continue" => Stmt::Continue,
                    "break" => Stmt::Break,
                    _ => Stmt::Pass,
                }
            }
            _ => {
                let name = r.name()?;
                let augmented = [("+=", "+"), ("-=", "-"), ("*=", "*"), ("/=", "/")];
                match augmented.iter().find(|a| a.0 == r.peek()) {
                    Some((_, op)) => {
                        r.at += 1;
                        let right = r.expr(0)?;
                        Stmt::Assign(name.clone(), Expr::Binary(op, Box::new(Expr::Name(name)), Box::new(right)))
                    }
                    None => {
                        r.need("=")?;
                        Stmt::Assign(name, r.expr(0)?)
                    }
                }
            }
        };
        r.end()?;
        out.push(statement);
    }
    Ok(out)
}

impl Function {
    /// Parses a program, which must be one function with nothing after it.
    pub fn read(text: &str) -> Result<Function, Stop> {
        let lines = lines(text)?;
        let Some((0, head)) = lines.first() else { return wrong("no function") };
        let mut r = Reader { tokens: head, at: 0, depth: 0 };
        r.need("def")?;
        let name = r.name()?;
        r.need("(")?;
        let mut parameters = Vec::new();
        while !r.take(")") {
            parameters.push(r.name()?);
            if !r.take(",") {
                r.need(")")?;
                break;
            }
        }
        r.need(":")?;
        r.end()?;
        let mut at = 1;
        let indent = lines.get(1).map_or(0, |l| l.0);
        if indent == 0 {
            return wrong("a function without a body");
        }
        let body = block(&lines, &mut at, indent, 0)?;
        match lines.get(at) {
            None => Ok(Function { name, parameters, body }),
            Some(_) => wrong("text after the function"),
        }
    }
    /// Calls the function, which may take at most `steps` steps.
    pub fn call(&self, arguments: Vec<Value>, steps: usize) -> Result<Value, Stop> {
        if arguments.len() != self.parameters.len() {
            return wrong(format!("{} arguments for {}", arguments.len(), self.parameters.len()));
        }
        let names = self.parameters.iter().cloned().zip(arguments).collect();
        let mut run = Run { names, steps };
        match run.block(&self.body)? {
            Flow::Return(value) => Ok(value),
            Flow::Next => Ok(Value::None),
            _ => wrong("continue or break outside a loop"),
        }
    }
}

enum Flow {
    Next,
    Continue,
    Break,
    Return(Value),
}

struct Run {
    names: HashMap<String, Value>,
    steps: usize,
}

const LONGEST: usize = 100_000;

impl Run {
    fn step(&mut self) -> Result<(), Stop> {
        self.steps = self.steps.checked_sub(1).ok_or(Stop::Steps)?;
        Ok(())
    }
    fn block(&mut self, body: &[Stmt]) -> Result<Flow, Stop> {
        for s in body {
            self.step()?;
            match s {
                Stmt::Assign(name, e) => {
                    let value = self.value(e)?;
                    self.names.insert(name.clone(), value);
                }
                Stmt::If(c, then, other) => {
                    let body = if self.value(c)?.truth() { then } else { other };
                    match self.block(body)? {
                        Flow::Next => {}
                        flow => return Ok(flow),
                    }
                }
                Stmt::While(c, body) => {
                    while self.value(c)?.truth() {
                        self.step()?;
                        match self.block(body)? {
                            Flow::Break => break,
                            Flow::Return(v) => return Ok(Flow::Return(v)),
                            _ => {}
                        }
                    }
                }
                Stmt::For(name, over, body) => {
                    let Value::List(items) = self.value(over)? else { return wrong("a loop over what is no list") };
                    for item in items {
                        self.step()?;
                        self.names.insert(name.clone(), item);
                        match self.block(body)? {
                            Flow::Break => break,
                            Flow::Return(v) => return Ok(Flow::Return(v)),
                            _ => {}
                        }
                    }
                }
                Stmt::Return(e) => return Ok(Flow::Return(self.value(e)?)),
                Stmt::Continue => return Ok(Flow::Continue),
                Stmt::Break => return Ok(Flow::Break),
                Stmt::Pass => {}
            }
        }
        Ok(Flow::Next)
    }
    fn value(&mut self, e: &Expr) -> Result<Value, Stop> {
        Ok(match e {
            Expr::Value(v) => v.clone(),
            Expr::Name(n) => match self.names.get(n) {
                Some(v) => v.clone(),
                None => return wrong(format!("the name {n} has no value")),
            },
            Expr::List(items) => Value::List(items.iter().map(|e| self.value(e)).collect::<Result<_, _>>()?),
            Expr::Negative(e) => match self.value(e)? {
                Value::Int(i) => Value::Int(i.checked_neg().ok_or(Stop::Wrong("overflow".into()))?),
                Value::Float(f) => Value::Float(-f),
                _ => return wrong("minus of what is no number"),
            },
            Expr::Index(list, index) => {
                let (Value::List(l), Value::Int(i)) = (self.value(list)?, self.value(index)?) else {
                    return wrong("an index of what is no list, or that is no integer");
                };
                let at = if i < 0 { i + l.len() as i64 } else { i };
                match usize::try_from(at).ok().and_then(|i| l.get(i)) {
                    Some(v) => v.clone(),
                    None => return wrong(format!("index {i} of {} elements", l.len())),
                }
            }
            Expr::Call(name, arguments) => {
                let values = arguments.iter().map(|e| self.value(e)).collect::<Result<Vec<_>, _>>()?;
                match (name.as_str(), &values[..]) {
                    ("len", [Value::List(l)]) => Value::Int(l.len() as i64),
                    ("range", [Value::Int(n)]) => self.range(0, *n)?,
                    ("range", [Value::Int(a), Value::Int(b)]) => self.range(*a, *b)?,
                    _ => return wrong(format!("a call of {name} with {} arguments", values.len())),
                }
            }
            Expr::Binary(op, a, b) => binary(op, self.value(a)?, self.value(b)?)?,
        })
    }
    fn range(&mut self, a: i64, b: i64) -> Result<Value, Stop> {
        if b.saturating_sub(a) > LONGEST as i64 {
            return Err(Stop::Steps);
        }
        Ok(Value::List((a..b).map(Value::Int).collect()))
    }
}

fn binary(op: &str, a: Value, b: Value) -> Result<Value, Stop> {
    if let "==" | "!=" = op {
        return Ok(Value::Int(i64::from((a == b) == (op == "=="))));
    }
    let order = |a: f64, b: f64| match op {
        "<" => Some(a < b),
        "<=" => Some(a <= b),
        ">" => Some(a > b),
        ">=" => Some(a >= b),
        _ => None,
    };
    match (&a, &b) {
        (Value::Int(x), Value::Int(y)) => {
            if order(0.0, 0.0).is_some() {
                let o = match op {
                    "<" => x < y,
                    "<=" => x <= y,
                    ">" => x > y,
                    _ => x >= y,
                };
                return Ok(Value::Int(i64::from(o)));
            }
            let exact = match op {
                "+" => x.checked_add(*y),
                "-" => x.checked_sub(*y),
                "*" => x.checked_mul(*y),
                _ if *y == 0 => return wrong("division by zero"),
                "/" => return Ok(Value::Float(*x as f64 / *y as f64)),
                // Rounded towards minus infinity, as in Python.
                "//" => x.checked_div_euclid(*y).map(|q| if *y < 0 && x.rem_euclid(*y) != 0 { q - 1 } else { q }),
                _ => x.checked_rem(*y).map(|r| if r != 0 && (r < 0) != (*y < 0) { r + y } else { r }),
            };
            exact.map(Value::Int).ok_or(Stop::Wrong("an integer past 64 bits".into()))
        }
        (Value::List(x), Value::List(y)) if op == "+" => {
            if x.len() + y.len() > LONGEST {
                return Err(Stop::Steps);
            }
            Ok(Value::List([&x[..], &y[..]].concat()))
        }
        (Value::List(l), Value::Int(n)) | (Value::Int(n), Value::List(l)) if op == "*" => {
            let n = usize::try_from(*n).unwrap_or(0);
            if l.len().saturating_mul(n) > LONGEST {
                return Err(Stop::Steps);
            }
            Ok(Value::List(std::iter::repeat_n(&l[..], n).flatten().cloned().collect()))
        }
        (Value::List(_), _) | (_, Value::List(_)) => wrong(format!("{op} of a list")),
        _ => {
            let (Some(x), Some(y)) = (a.number(), b.number()) else { return wrong(format!("{op} of None")) };
            if let Some(o) = order(x, y) {
                return Ok(Value::Int(i64::from(o)));
            }
            Ok(Value::Float(match op {
                "+" => x + y,
                "-" => x - y,
                "*" => x * y,
                _ if y == 0.0 => return wrong("division by zero"),
                "/" => x / y,
                "//" => (x / y).floor(),
                _ => x - y * (x / y).floor(),
            }))
        }
    }
}

/// The interpreter as a judge. Tests are lines `assert candidate(ARGUMENTS) == VALUE` of literals.
#[derive(Clone, Debug)]
pub struct Interpreter {
    /// The most steps that a call may take; more give [`Verdict::Cpu`].
    pub steps: usize,
}

impl Default for Interpreter {
    /// A limit of 20,000 steps.
    fn default() -> Interpreter {
        Interpreter { steps: 20_000 }
    }
}

/// The calls of a test with their expected results.
fn calls(test: &str) -> Result<Vec<(Vec<Value>, Value)>, Stop> {
    let mut out = Vec::new();
    for (_, tokens) in lines(test)?.iter().filter(|l| l.1[0].text == "assert") {
        let mut r = Reader { tokens, at: 1, depth: 0 };
        let Expr::Binary("==", call, want) = r.expr(0)? else { return wrong("an assertion that is no equality") };
        // After a comma there may be a message.
        if r.peek() != "," {
            r.end()?;
        }
        let Expr::Call(_, arguments) = *call else { return wrong("an assertion about no call") };
        let mut none = Run { names: HashMap::new(), steps: 0 };
        let arguments = arguments.iter().map(|e| none.value(e)).collect::<Result<_, _>>()?;
        out.push((arguments, none.value(&want)?));
    }
    if out.is_empty() { wrong("a test without assertions") } else { Ok(out) }
}

impl Interpreter {
    /// The verdict of one program.
    pub fn run(&self, program: &Program) -> Verdict {
        let calls = match calls(&program.test) {
            Ok(calls) => calls,
            Err(e) => return Verdict::Infrastructure(format!("the test is not of the mini language: {e:?}")),
        };
        let function = match Function::read(&program.source) {
            Ok(f) if f.name == program.entry_point => f,
            _ => return Verdict::Error,
        };
        for (arguments, want) in calls {
            match function.call(arguments, self.steps) {
                Ok(got) if got == want => {}
                Ok(_) => return Verdict::Failed,
                Err(Stop::Steps) => return Verdict::Cpu,
                Err(Stop::Wrong(_)) => return Verdict::Error,
            }
        }
        Verdict::Passed
    }
}

impl Judge for Interpreter {
    fn judge(&self, programs: &[Program]) -> Result<Vec<Verdict>> {
        Ok(programs.iter().map(|p| self.run(p)).collect())
    }
}

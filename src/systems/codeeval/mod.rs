//! Completion of code with potential bugs: how a code model is affected by an error in its context.
//!
//! Dinh, Zhao, Tan, Negrinho, Lausen, Zha and Karypis, "Large Language Models of Code Fail at Completing Code with Potential
//! Bugs" (NeurIPS 2023). The task: given a specification and a prefix `s'` of a program in which one operator was flipped, write a
//! whole program that passes the specification's tests. Buggy prefixes are made from a problem set in this way:
//!
//! 1. blank lines of the prompt and of the solution are dropped;
//! 2. candidate sites are the binary arithmetic, comparison and augmented-assignment operators of the solution;
//! 3. one operator is flipped ([`FlipMap::paper`]), and the flip is kept if the edited program fails a test;
//! 4. for each line from the one of the flip to the last but one, the lines up to it are a prefix, clean and buggy.
//!
//! A score is [`passk::pass_at_k`] (Chen et al. 2021, equation 1), averaged over the samples of a prefix, over the prefixes of a
//! problem, and over problems, because three problems hold a quarter of all prefixes.
//!
//! | module | what it has |
//! |---|---|
//! | [`python`] | enough of Python's lexer to find operators outside strings |
//! | [`buggy`] | the generator of buggy prefixes, for any set of problems with tests |
//! | [`sandbox`] | runs generated programs without files, network or other processes, and gives verdicts |
//! | [`locate`] | finds the operator that a language model doubts most |
//! | [`lm`] | the interface to a model of code, and a GPT with its tokenizer as such a model |
//! | [`mitigate`] | three ways to treat a prefix that may have a bug |
//! | [`mini`] | a language that is a part of Python, its interpreter, problem families, and a model of it |
//! | [`ngram`] | a baseline for location: operators counted by the tokens around them |
//! | [`overlap`] | whether a training text shares a passage with the benchmark |
//! | [`passk`] | pass@k without bias, averages over problems, bootstrap intervals |

pub mod buggy;
pub mod lm;
pub mod locate;
pub mod mini;
pub mod mitigate;
pub mod ngram;
pub mod overlap;
pub mod passk;
pub mod python;
pub mod sandbox;

pub use buggy::{FlipMap, Mode, Problem, Row};
pub use lm::{CodeLm, CodeModel, Draw};
pub use sandbox::{Judge, Limits, Program, Sandbox, Verdict};

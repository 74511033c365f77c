//! Robustness of text classifiers, measured so that miscalibration cannot imitate it.
//!
//! Raina, Tan, Cai, Gales: "Extreme Miscalibration and the Illusion of Adversarial Robustness" (ACL 2024). Word-substitution attacks lower
//! the probability of the right class, P(c|x;T) = exp(l_c/T) / Σ_i exp(l_i/T), step by step. If a model serves its logits l divided by a
//! temperature T_d far from 1, the attacks see no progress, and the model looks robust. Dividing the served logits by an attacker's
//! temperature T_a first makes the attack work again:
//!
//! - calibrated: T_a = argmin_T of the negative log-likelihood of validation texts ([`Calibrate`]);
//! - optimised: T_a = argmin_T Q(T), the accuracy under an attack on validation texts ([`evaluate::best_temperature`]);
//! - on the margin, max_{c≠y} l_c − l_y, a temperature does not change the search at all ([`Score::Margin`]).
//!
//! The model's own class always decides whether an attack has succeeded, so that only the search differs. Accuracy under attack Q is a
//! share of all texts: those that are wrong without an attack count as wrong.
//!
//! ```
//! use prismgrad::systems::robustness::{Attack, Batch, Evaluate, Served, Synonyms, Text, TextModel, TextSet};
//! # fn main() -> prismgrad::Result<()> {
//! /// Counts good and bad words.
//! struct Counter;
//! impl TextModel for Counter {
//!     fn classes(&self) -> usize {
//!         2
//!     }
//!     fn logits(&self, batch: &Batch) -> prismgrad::Result<Vec<f32>> {
//!         let worth = |w: &&str| match *w {
//!             "great" => 2.0,
//!             "good" | "fine" => 1.0,
//!             "decent" => -0.5,
//!             "dull" => -2.0,
//!             _ => 0.0f32,
//!         };
//!         let sum = |i: usize| batch.get(i).iter().map(worth).sum::<f32>();
//!         Ok((0..batch.len()).flat_map(|i| [-sum(i), sum(i)]).collect())
//!     }
//! }
//! let set = TextSet::new(
//!     vec![Text::new("a good and great film"), Text::new("dull film"), Text::new("good, decent story")],
//!     vec![1, 0, 1],
//!     vec!["bad".into(), "good".into()],
//! )?;
//! let synonyms = Synonyms::of_pairs([("good", "decent"), ("great", "decent"), ("good", "fine")]);
//! let attack = Attack::pwws(&synonyms).budget(500);
//! let report = Evaluate::new(&attack).run(&Served::new(&Counter).temperature(1e-3), &set, &set)?;
//! assert_eq!(report.clean, 1.0);
//! assert!(report.margin.accuracy <= report.plain.accuracy);
//! println!("{report}");
//! # Ok(()) }
//! ```

pub mod attack;
pub mod calibrate;
pub mod data;
pub mod evaluate;
pub mod flags;
pub mod models;
pub mod page;
pub mod score;
pub mod served;
pub mod text;
pub mod train;
pub mod vectors;
pub mod words;

pub use attack::{Attack, Found, Importance, Misspellings, Outcome, Transformation, accuracy_under_attack};
pub use calibrate::{Calibrate, Reliability, reliability};
pub use evaluate::{Attacked, Evaluate, Report};
pub use flags::{Flag, Limits};
pub use models::{Architecture, Classifier, ModelConfig, Vocabulary};
pub use score::{Lens, Precision, Score};
pub use served::{Answers, Batch, Output, Served, TextModel};
pub use text::{Text, TextSet, windows_1252};
pub use train::{Pgd, Training, augmented};
pub use vectors::{Neighbours, Similarity, WordVectors};
pub use words::{Synonyms, WordClasses};

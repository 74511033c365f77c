//! One error type for the whole crate.
//!
//! Every message names the operation, what it was given, and how to correct it. Invalid input from the user gives an error, never a panic.

use std::fmt;
use std::path::{Path, PathBuf};

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Describes which operation failed, why, and what to do about it.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// Shapes that do not fit the operation.
    Shape {
        /// Operation or function.
        op: &'static str,
        /// What was given and what was expected.
        message: String,
    },
    /// An element type that the operation does not accept.
    DType {
        /// Operation or function.
        op: &'static str,
        /// What was given and what was expected.
        message: String,
    },
    /// An argument outside its domain.
    Invalid {
        /// Operation or function.
        op: &'static str,
        /// What was given and what was expected.
        message: String,
    },
    /// A gradient was requested where there is none.
    Autograd {
        /// Operation or function.
        op: &'static str,
        /// Why there is no gradient.
        message: String,
    },
    /// Something that would break the privacy guarantee, refused before it happens.
    Privacy {
        /// What is refused and what to use instead.
        message: String,
    },
    /// The privacy budget does not allow another step.
    BudgetSpent {
        /// ε after the refused step.
        epsilon: f64,
        /// The target.
        budget: f64,
        /// Steps taken so far.
        steps: u64,
    },
    /// A device that is absent or failed.
    Device {
        /// What failed and what to do.
        message: String,
    },
    /// The operating system refused a file operation.
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was being done, such as "write checkpoint".
        action: &'static str,
        /// The system's own error.
        source: std::io::Error,
    },
    /// A file whose contents do not have the expected format.
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it and what to do.
        message: String,
    },
    /// The run was interrupted (Ctrl-C); its state has been saved.
    Interrupted {
        /// How to resume.
        message: String,
    },
}

impl Error {
    /// A [`Error::Shape`].
    pub fn shape(op: &'static str, message: impl Into<String>) -> Self {
        Error::Shape { op, message: message.into() }
    }
    /// A [`Error::DType`].
    pub fn dtype(op: &'static str, message: impl Into<String>) -> Self {
        Error::DType { op, message: message.into() }
    }
    /// A [`Error::Invalid`].
    pub fn invalid(op: &'static str, message: impl Into<String>) -> Self {
        Error::Invalid { op, message: message.into() }
    }
    /// A [`Error::Autograd`].
    pub fn autograd(op: &'static str, message: impl Into<String>) -> Self {
        Error::Autograd { op, message: message.into() }
    }
    /// A [`Error::Privacy`].
    pub fn privacy(message: impl Into<String>) -> Self {
        Error::Privacy { message: message.into() }
    }
    /// A [`Error::Device`]: what was being done, and what went wrong.
    pub fn device(op: impl fmt::Display, message: impl fmt::Display) -> Self {
        Error::Device { message: format!("{op}: {message}") }
    }
    /// A [`Error::Io`]; use as `.map_err(|e| Error::io("write checkpoint", path, e))`.
    pub fn io(action: &'static str, path: impl AsRef<Path>, source: std::io::Error) -> Self {
        Error::Io { path: path.as_ref().to_path_buf(), action, source }
    }
    /// A [`Error::Format`].
    pub fn format(path: impl AsRef<Path>, message: impl Into<String>) -> Self {
        Error::Format { path: path.as_ref().to_path_buf(), message: message.into() }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Shape { op, message }
            | Error::DType { op, message }
            | Error::Invalid { op, message }
            | Error::Autograd { op, message } => write!(f, "{op}: {message}"),
            Error::Privacy { message } => write!(f, "private training refused: {message}"),
            Error::BudgetSpent { epsilon, budget, steps } => write!(
                f,
                "privacy budget spent: step {} would bring ε to {epsilon:.4}, above the target {budget}; \
                 raise the target before training, or stop here",
                steps + 1
            ),
            Error::Device { message } => write!(f, "device: {message}"),
            Error::Io { path, action, source } => write!(f, "cannot {action} {}: {source}", path.display()),
            Error::Format { path, message } => write!(f, "{}: {message}", path.display()),
            Error::Interrupted { message } => write!(f, "interrupted: {message}"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}

//! Arrays, ops, layers, models and steps, on every device there is.

#[path = "../common"]
mod common {
    pub mod distance;
    pub mod gpt;
    pub mod mixtral;
    pub mod privacy;
    pub mod scratch;
    pub mod skip;
    pub mod texts;
    pub mod tokens;
    pub mod values;
}

mod all_or_nothing;
mod attention;
mod bad_input;
mod devices;
mod edges;
mod hypergraph;
mod indexing;
mod io_data;
mod layers;
mod lora;
mod mixtral;
mod models;
mod moe;
mod ops;
mod per_sample;
mod precision;
mod refusals;
mod sensitivity;
mod spans;
mod training;

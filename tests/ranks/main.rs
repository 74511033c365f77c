//! Several ranks: collectives, sharded state, experts across ranks.

#[path = "../common"]
mod common {
    pub mod distance;
    pub mod gpt;
    pub mod records;
    pub mod values;
}

mod dist;
mod moe_ranks;
mod mpi;
mod zero;

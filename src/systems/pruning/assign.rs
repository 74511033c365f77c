//! Optimal assignment, by shortest augmenting paths (Jonker and Volgenant 1987).

use crate::base::{Error, Result};

/// An assignment of rows to columns at the least cost, and a proof that it is the least.
#[derive(Clone, Debug)]
pub struct Assignment {
    /// The column of each row.
    pub columns: Vec<usize>,
    /// The sum of the costs.
    pub cost: f64,
    /// Dual values u of the rows and v of the columns: uᵢ + vⱼ ≤ cᵢⱼ everywhere, with equality where row i has column j. Any assignment
    /// therefore costs at least Σu + Σv, which is the cost of this one.
    pub rows: Vec<f64>,
    /// The dual values v of the columns.
    pub duals: Vec<f64>,
}

/// Assigns n rows to n columns one to one at the least cost. `costs` is `[n, n]` in row-major order. It takes O(n³) operations, in f64.
///
/// Fails if `costs` has another size or a value that is not finite.
pub fn assign(costs: &[f64], n: usize) -> Result<Assignment> {
    if n.checked_mul(n) != Some(costs.len()) {
        return Err(Error::shape("assign", format!("{} costs; {n} rows and columns have {n}²", costs.len())));
    }
    if let Some(at) = costs.iter().position(|c| !c.is_finite()) {
        let (row, column) = (at / n, at % n);
        return Err(Error::invalid(
            "assign",
            format!("the cost of row {row} and column {column} is {}; it must be finite", costs[at]),
        ));
    }
    const FREE: usize = usize::MAX;
    let (mut u, mut v) = (vec![0f64; n], vec![0f64; n]);
    let (mut row_of, mut column_of) = (vec![FREE; n], vec![FREE; n]);
    // For the row that is being added: the length of the shortest path to each column, the row before it, and whether the length is final.
    let (mut shortest, mut before, mut done) = (vec![0f64; n], vec![FREE; n], vec![false; n]);
    for start in 0..n {
        shortest.fill(f64::INFINITY);
        done.fill(false);
        let (mut row, mut length) = (start, 0.0);
        let mut scanned = vec![start];
        let end = loop {
            let (line, base) = (&costs[row * n..(row + 1) * n], length - u[row]);
            let (mut best, mut at) = (f64::INFINITY, FREE);
            for j in 0..n {
                if done[j] {
                    continue;
                }
                let through = base + line[j] - v[j];
                if through < shortest[j] {
                    shortest[j] = through;
                    before[j] = row;
                }
                // Among equal lengths a free column is preferred, because it ends the search.
                if shortest[j] < best || (shortest[j] == best && row_of[j] == FREE && row_of[at] != FREE) {
                    (best, at) = (shortest[j], j);
                }
            }
            length = best;
            done[at] = true;
            match row_of[at] {
                FREE => break at,
                next => row = next,
            }
            scanned.push(row);
        };
        // The dual values are changed so that the edges of the path become tight.
        for &r in &scanned[1..] {
            u[r] += length - shortest[column_of[r]];
        }
        u[start] += length;
        for j in (0..n).filter(|&j| done[j]) {
            v[j] -= length - shortest[j];
        }
        let mut column = end;
        loop {
            let row = before[column];
            row_of[column] = row;
            std::mem::swap(&mut column_of[row], &mut column);
            if row == start {
                break;
            }
        }
    }
    let cost = column_of.iter().enumerate().map(|(i, &j)| costs[i * n + j]).sum();
    Ok(Assignment { columns: column_of, cost, rows: u, duals: v })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::philox::uniform;

    /// The least cost over all permutations, which are enumerated by swaps.
    fn brute(costs: &[f64], n: usize) -> f64 {
        fn go(costs: &[f64], n: usize, order: &mut [usize], at: usize) -> f64 {
            if at == n {
                return order.iter().enumerate().map(|(i, &j)| costs[i * n + j]).sum();
            }
            (at..n).fold(f64::INFINITY, |best, i| {
                order.swap(at, i);
                let cost = go(costs, n, order, at + 1);
                order.swap(at, i);
                best.min(cost)
            })
        }
        go(costs, n, &mut (0..n).collect::<Vec<_>>(), 0)
    }

    fn certified(costs: &[f64], n: usize) -> Assignment {
        let found = assign(costs, n).unwrap();
        let mut seen = found.columns.clone();
        seen.sort_unstable();
        assert_eq!(seen, (0..n).collect::<Vec<_>>());
        for i in 0..n {
            for j in 0..n {
                assert!(found.rows[i] + found.duals[j] <= costs[i * n + j] + 1e-9, "row {i}, column {j}");
            }
        }
        let bound: f64 = found.rows.iter().chain(&found.duals).sum();
        assert!((bound - found.cost).abs() < 1e-9 * n as f64, "{bound} {}", found.cost);
        found
    }

    #[test]
    fn it_costs_the_least_of_all_permutations() {
        for seed in 0..200u64 {
            let n = 1 + (seed % 7) as usize;
            // Every third case has ties, every fifth numbers of very different size.
            let cost = |i: usize| {
                let x = uniform(seed, 0, i as u64) - 0.5;
                if seed % 3 == 0 {
                    (4.0 * x).round()
                } else if seed % 5 == 0 {
                    x.powi(9) * 1e9
                } else {
                    x
                }
            };
            let costs: Vec<f64> = (0..n * n).map(cost).collect();
            let (found, best) = (certified(&costs, n), brute(&costs, n));
            assert!((found.cost - best).abs() <= 1e-9 * (1.0 + best.abs()), "seed {seed}: {} {best}", found.cost);
        }
    }

    #[test]
    fn a_large_one_is_certified() {
        let n = 384;
        let costs: Vec<f64> = (0..n * n).map(|i| uniform(7, 1, i as u64)).collect();
        // The expected least cost of uniform costs tends to π²/6 (Aldous 2001).
        let found = certified(&costs, n);
        assert!((1.4..1.9).contains(&found.cost), "{}", found.cost);
    }

    #[test]
    fn what_is_no_square_of_numbers_is_refused() {
        assert!(assign(&[1.0; 5], 2).unwrap_err().to_string().contains("5 costs"));
        assert!(assign(&[1.0, f64::NAN, 0.0, 1.0], 2).unwrap_err().to_string().contains("row 0 and column 1"));
        assert!(assign(&[], 0).unwrap().columns.is_empty());
    }
}

//! Spectral clustering (Ng, Jordan and Weiss 2002) with k-means++ (Arthur and Vassilvitskii 2007).

use crate::base::{Error, Result};
use crate::random::Rng;

/// The eigenvalues of a symmetric matrix `[n, n]` in ascending order, and its eigenvectors as columns of a row-major `[n, n]`, by Jacobi
/// rotations. This is fast enough for the few hundred experts of a layer; a linear-algebra crate would double the time of a clean build.
fn symmetric_eigen(a: &[f64], n: usize) -> (Vec<f64>, Vec<f64>) {
    let mut a = a.to_vec();
    let mut q: Vec<f64> = (0..n * n).map(|i| (i / n == i % n) as u8 as f64).collect();
    let scale = a.iter().map(|x| x * x).sum::<f64>();
    for _ in 0..60 {
        let off: f64 = (0..n * n).filter(|i| i / n != i % n).map(|i| a[i] * a[i]).sum();
        if off <= 1e-28 * scale {
            break;
        }
        for p in 0..n {
            for r in p + 1..n {
                let x = a[p * n + r];
                if x == 0.0 {
                    continue;
                }
                let theta = (a[r * n + r] - a[p * n + p]) / (2.0 * x);
                let t = theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt());
                let t = if theta == 0.0 { 1.0 } else { t };
                let c = 1.0 / (t * t + 1.0).sqrt();
                let s = t * c;
                for k in 0..n {
                    let (x, y) = (a[k * n + p], a[k * n + r]);
                    (a[k * n + p], a[k * n + r]) = (c * x - s * y, s * x + c * y);
                }
                for k in 0..n {
                    let (x, y) = (a[p * n + k], a[r * n + k]);
                    (a[p * n + k], a[r * n + k]) = (c * x - s * y, s * x + c * y);
                }
                for k in 0..n {
                    let (x, y) = (q[k * n + p], q[k * n + r]);
                    (q[k * n + p], q[k * n + r]) = (c * x - s * y, s * x + c * y);
                }
            }
        }
    }
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&i, &j| a[i * n + i].total_cmp(&a[j * n + j]));
    let values = order.iter().map(|&i| a[i * n + i]).collect();
    let vectors = (0..n * n).map(|i| q[i / n * n + order[i % n]]).collect();
    (values, vectors)
}

/// Clusters n items into k by their similarities `[n, n]`, which must be symmetric and not negative. It takes the k eigenvectors of the
/// smallest eigenvalues of the Laplacian I − D^(−½)·S·D^(−½), scales rows to length one, and returns the best of `restarts` runs of k-means
/// as the cluster of each item. Clusters are numbered by their first item, and none is empty.
pub fn spectral(similarity: &[f64], n: usize, k: usize, restarts: usize, seed: u64) -> Result<Vec<usize>> {
    if similarity.len() != n * n {
        return Err(Error::shape(
            "spectral",
            format!("{} similarities of {n} items; there must be {n}²", similarity.len()),
        ));
    }
    if k == 0 || k > n {
        return Err(Error::invalid("spectral", format!("{k} clusters of {n} items")));
    }
    if let Some(x) = similarity.iter().find(|x| !(x.is_finite() && **x >= 0.0)) {
        return Err(Error::invalid("spectral", format!("a similarity is {x}; they must be 0 or more")));
    }
    let degree: Vec<f64> = (0..n).map(|i| similarity[i * n..(i + 1) * n].iter().sum::<f64>().max(1e-300)).collect();
    let laplacian: Vec<f64> = (0..n * n)
        .map(|x| (x / n == x % n) as u8 as f64 - similarity[x] / (degree[x / n] * degree[x % n]).sqrt())
        .collect();
    let (_, vectors) = symmetric_eigen(&laplacian, n);
    let mut points: Vec<f64> = (0..n * k).map(|x| vectors[x / k * n + x % k]).collect();
    for row in points.chunks_exact_mut(k) {
        let length = row.iter().map(|x| x * x).sum::<f64>().sqrt();
        row.iter_mut().for_each(|x| *x /= length.max(1e-300));
    }
    Ok(k_means(&points, k, k, restarts, seed))
}

fn distance(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| (x - y) * (x - y)).sum()
}

/// The clusters with the smallest sum of squared distances among `restarts` runs of k-means.
fn k_means(points: &[f64], width: usize, k: usize, restarts: usize, seed: u64) -> Vec<usize> {
    let items: Vec<&[f64]> = points.chunks_exact(width).collect();
    let mut best = (f64::INFINITY, Vec::new());
    for restart in 0..restarts.max(1) {
        let mut rng = Rng::new(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(restart as u64));
        let mut centers = first_centers(&items, k, &mut rng);
        let mut of = vec![usize::MAX; items.len()];
        for _ in 0..100 {
            let nearest = |p: &[f64]| {
                let far = |c: &usize| distance(p, &centers[*c]);
                (0..k).min_by(|a, b| far(a).total_cmp(&far(b))).unwrap_or(0)
            };
            let mut next: Vec<usize> = items.iter().map(|p| nearest(p)).collect();
            // An empty cluster gets the item that is farthest from its own centre, from a cluster with more than one item.
            for c in 0..k {
                if !next.contains(&c) {
                    let alone = |i: usize| next.iter().filter(|&&d| d == next[i]).count() == 1;
                    let far = |i: &usize| distance(items[*i], &centers[next[*i]]);
                    let taken = (0..items.len()).filter(|&i| !alone(i)).max_by(|a, b| far(a).total_cmp(&far(b)));
                    if let Some(i) = taken {
                        next[i] = c;
                    }
                }
            }
            if next == of {
                break;
            }
            of = next;
            for (c, center) in centers.iter_mut().enumerate() {
                let own: Vec<&&[f64]> = items.iter().zip(&of).filter(|(_, d)| **d == c).map(|(p, _)| p).collect();
                *center = (0..width).map(|x| own.iter().map(|p| p[x]).sum::<f64>() / own.len().max(1) as f64).collect();
            }
        }
        let spread = items.iter().zip(&of).map(|(p, &c)| distance(p, &centers[c])).sum::<f64>();
        if spread < best.0 {
            best = (spread, of);
        }
    }
    numbered(&best.1)
}

/// The first centres of k-means++: each further centre is an item drawn in proportion to its squared distance from the nearest centre so
/// far.
fn first_centers(items: &[&[f64]], k: usize, rng: &mut Rng) -> Vec<Vec<f64>> {
    let mut centers = vec![items[rng.below(items.len() as u64) as usize].to_vec()];
    while centers.len() < k {
        let far: Vec<f64> =
            items.iter().map(|p| centers.iter().map(|c| distance(p, c)).fold(f64::INFINITY, f64::min)).collect();
        let mut left = rng.uniform() * far.iter().sum::<f64>();
        let drawn = far.iter().position(|f| {
            left -= f;
            left < 0.0
        });
        // If all items coincide with a centre, any item is as good.
        centers.push(items[drawn.unwrap_or(items.len() - 1)].to_vec());
    }
    centers
}

/// The same clusters, numbered by their first item.
pub(super) fn numbered(of: &[usize]) -> Vec<usize> {
    let mut order: Vec<usize> = Vec::new();
    let number = |order: &mut Vec<usize>, c: usize| match order.iter().position(|&d| d == c) {
        Some(i) => i,
        None => {
            order.push(c);
            order.len() - 1
        }
    };
    of.iter().map(|&c| number(&mut order, c)).collect()
}

/// The adjusted Rand index of two clusterings of the same items (Hubert and Arabie 1985): 1 if they are the same, and about 0 if they agree
/// only by chance.
pub fn adjusted_rand(a: &[usize], b: &[usize]) -> f64 {
    let pairs = |n: usize| n as f64 * (n as f64 - 1.0) / 2.0;
    let size = |x: &[usize]| x.iter().max().map_or(0, |m| m + 1);
    let mut table = vec![vec![0usize; size(b)]; size(a)];
    a.iter().zip(b).for_each(|(&i, &j)| table[i][j] += 1);
    let together: f64 = table.iter().flatten().map(|&n| pairs(n)).sum();
    let rows: f64 = table.iter().map(|r| pairs(r.iter().sum())).sum();
    let columns: f64 = (0..size(b)).map(|j| pairs(table.iter().map(|r| r[j]).sum())).sum();
    let expected = rows * columns / pairs(a.len()).max(1.0);
    let most = (rows + columns) / 2.0;
    if most == expected { 1.0 } else { (together - expected) / (most - expected) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::philox::normal;

    #[test]
    fn eigenvectors_give_the_matrix_back() {
        for n in [1usize, 2, 5, 40] {
            let b: Vec<f64> = (0..n * n).map(|i| normal(n as u64, 0, i as u64)).collect();
            let a: Vec<f64> = (0..n * n).map(|x| b[x] + b[x % n * n + x / n]).collect();
            let (values, q) = symmetric_eigen(&a, n);
            assert!(values.windows(2).all(|w| w[0] <= w[1]));
            for i in 0..n {
                for j in 0..n {
                    let dot =
                        |f: &dyn Fn(usize) -> f64| (0..n).map(|k| q[i * n + k] * f(k) * q[j * n + k]).sum::<f64>();
                    assert!((dot(&|k| values[k]) - a[i * n + j]).abs() < 1e-10 * n as f64);
                    assert!((dot(&|_| 1.0) - (i == j) as u8 as f64).abs() < 1e-12 * n as f64);
                }
            }
        }
    }

    #[test]
    fn planted_clusters_are_found_and_chance_is_not() {
        let n = 24;
        let of: Vec<usize> = (0..n).map(|i| i % 4).collect();
        let near = |i: usize, j: usize| if of[i] == of[j] { 0.9 } else { 0.2 };
        let noise = |i: usize, j: usize| 0.05 * normal(3, i.min(j) as u64, i.max(j) as u64);
        let s: Vec<f64> = (0..n * n).map(|x| (near(x / n, x % n) + noise(x / n, x % n)).max(0.0)).collect();
        assert_eq!(adjusted_rand(&spectral(&s, n, 4, 10, 0).unwrap(), &of), 1.0);
        // Equal similarities have no clusters. Four are found nevertheless, and they agree only by chance.
        let flat: Vec<f64> = (0..n * n).map(|x| 0.5 + noise(x / n, x % n)).collect();
        let found = spectral(&flat, n, 4, 10, 0).unwrap();
        assert_eq!(found.iter().max(), Some(&3));
        assert!(adjusted_rand(&found, &of).abs() < 0.3);
        assert_eq!(spectral(&s, n, n, 3, 1).unwrap(), (0..n).collect::<Vec<_>>());
        assert_eq!(spectral(&[1.0; 16], 4, 1, 3, 1).unwrap(), [0; 4]);
        assert!(spectral(&s, n, 25, 1, 0).unwrap_err().to_string().contains("25 clusters of 24"));
        assert!(spectral(&[-1.0], 1, 1, 1, 0).is_err());
    }

    #[test]
    fn the_adjusted_rand_index_is_right() {
        assert_eq!(adjusted_rand(&[0, 0, 1, 1], &[1, 1, 0, 0]), 1.0);
        // Hubert and Arabie's formula by hand: together 0, rows 2, columns 2, all 6.
        assert!((adjusted_rand(&[0, 0, 1, 1], &[0, 1, 0, 1]) - (0.0 - 4.0 / 6.0) / (2.0 - 4.0 / 6.0)).abs() < 1e-12);
    }
}

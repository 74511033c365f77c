//! Learning of merges. Pair counts are kept up to date, so that the cost of a merge depends only on the words that contain it.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet};

use super::split::pieces;

type Pair = (u32, u32);

/// A distinct piece of text and the number of times it occurs.
struct Word {
    ids: Vec<u32>,
    count: i64,
}

/// Appends tokens until there are `vocab_size` and returns the merges in order.
pub(super) fn learn<T: AsRef<str>>(
    texts: impl IntoIterator<Item = T>,
    bytes: &[u32; 256],
    tokens: &mut Vec<Option<Vec<u8>>>,
    vocab_size: usize,
) -> Vec<Pair> {
    let mut words = count_words(texts, bytes);
    let mut counts: HashMap<Pair, i64> = HashMap::new();
    let mut places: HashMap<Pair, HashSet<usize>> = HashMap::new();
    for (i, word) in words.iter().enumerate() {
        for pair in pairs(&word.ids) {
            *counts.entry(pair).or_default() += word.count;
            places.entry(pair).or_default().insert(i);
        }
    }
    // Counts in the heap may be out of date, so an entry is checked when it is popped. A count that grows gets a new entry.
    let mut heap: BinaryHeap<(i64, Reverse<Pair>)> = counts.iter().map(|(&p, &c)| (c, Reverse(p))).collect();
    let mut known: HashMap<Vec<u8>, u32> =
        tokens.iter().enumerate().filter_map(|(i, t)| Some((t.clone()?, i as u32))).collect();
    let mut merges = Vec::new();
    while tokens.len() < vocab_size {
        let Some((count, Reverse(pair))) = heap.pop() else { break };
        let now = counts.get(&pair).copied().unwrap_or(0);
        if now != count || now <= 0 {
            if now > 0 && now < count {
                heap.push((now, Reverse(pair)));
            }
            continue;
        }
        let text_of = |id: u32| tokens[id as usize].as_deref().unwrap_or(&[]);
        let joined = [text_of(pair.0), text_of(pair.1)].concat();
        // Different merges that give the same text share one id.
        let id = *known.entry(joined.clone()).or_insert(tokens.len() as u32);
        if id as usize == tokens.len() {
            tokens.push(Some(joined));
        }
        merges.push(pair);
        let mut grown = HashSet::new();
        for place in places.remove(&pair).unwrap_or_default() {
            let word = &mut words[place];
            for old in pairs(&word.ids) {
                *counts.entry(old).or_default() -= word.count;
            }
            merge(&mut word.ids, pair, id);
            for new in pairs(&word.ids) {
                *counts.entry(new).or_default() += word.count;
                if new.0 == id || new.1 == id {
                    places.entry(new).or_default().insert(place);
                    grown.insert(new);
                }
            }
        }
        counts.remove(&pair);
        heap.extend(grown.into_iter().filter_map(|p| Some((*counts.get(&p)?, Reverse(p)))));
    }
    merges
}

fn count_words<T: AsRef<str>>(texts: impl IntoIterator<Item = T>, bytes: &[u32; 256]) -> Vec<Word> {
    let mut counts: HashMap<Box<str>, i64> = HashMap::new();
    for text in texts {
        for piece in pieces(text.as_ref()) {
            match counts.get_mut(piece) {
                Some(count) => *count += 1,
                None => drop(counts.insert(piece.into(), 1)),
            }
        }
    }
    let ids = |piece: &str| piece.bytes().map(|b| bytes[usize::from(b)]).collect();
    counts.into_iter().map(|(piece, count)| Word { ids: ids(&piece), count }).collect()
}

fn pairs(ids: &[u32]) -> impl Iterator<Item = Pair> {
    ids.windows(2).map(|w| (w[0], w[1]))
}

/// Replaces a pair by its id, from left to right, in place.
fn merge(ids: &mut Vec<u32>, pair: Pair, id: u32) {
    let (mut read, mut write) = (0, 0);
    while read < ids.len() {
        let hit = ids[read] == pair.0 && ids.get(read + 1) == Some(&pair.1);
        ids[write] = if hit { id } else { ids[read] };
        read += if hit { 2 } else { 1 };
        write += 1;
    }
    ids.truncate(write);
}

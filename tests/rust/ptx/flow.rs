//! Where lanes that a branch parts meet again: at the branch's immediate post-dominator, the first instruction that all
//! ways from there to the end go through (Cooper, Harvey and Kennedy, "A simple, fast dominance algorithm", on the graph turned).

/// Ways that leave each instruction: the next one, a target, both or none.
pub(crate) type Successors = [Option<u32>; 2];

/// For each instruction, the first one that every way from it passes later; `u32::MAX` where there is none but the end.
pub(crate) fn meetings(ways: &[Successors]) -> Vec<u32> {
    let count = ways.len();
    let end = count;
    let mut into = vec![vec![]; count + 1];
    for (at, to) in ways.iter().enumerate() {
        let mut leaves = false;
        for to in to.iter().flatten() {
            into[*to as usize].push(at);
            leaves = true;
        }
        if !leaves {
            into[end].push(at);
        }
    }
    let order = after_all_below(&into, end);
    let mut rank = vec![usize::MAX; count + 1];
    order.iter().enumerate().for_each(|(i, at)| rank[*at] = i);
    let mut meets = vec![usize::MAX; count + 1];
    meets[end] = end;
    let mut changed = true;
    while changed {
        changed = false;
        for &at in order.iter().rev().filter(|at| **at != end) {
            let out: Vec<usize> = ways[at].iter().flatten().map(|to| *to as usize).collect();
            let out = if out.is_empty() { vec![end] } else { out };
            let known = out.into_iter().filter(|to| meets[*to] != usize::MAX);
            let found = known.reduce(|a, b| first_common(&meets, &rank, a, b)).unwrap_or(usize::MAX);
            changed |= meets[at] != found;
            meets[at] = found;
        }
    }
    meets[..count].iter().map(|m| if *m >= end { u32::MAX } else { *m as u32 }).collect()
}

/// Instructions from which the end is reached, each after those that are reached through it (from the end, backwards).
fn after_all_below(into: &[Vec<usize>], end: usize) -> Vec<usize> {
    let (mut order, mut seen) = (vec![], vec![false; into.len()]);
    let mut stack = vec![(end, 0)];
    seen[end] = true;
    while let Some((at, next)) = stack.pop() {
        match into[at].get(next) {
            None => order.push(at),
            Some(&from) => {
                stack.push((at, next + 1));
                if !seen[from] {
                    seen[from] = true;
                    stack.push((from, 0));
                }
            }
        }
    }
    order
}

fn first_common(meets: &[usize], rank: &[usize], mut a: usize, mut b: usize) -> usize {
    while a != b {
        while rank[a] < rank[b] {
            a = meets[a];
        }
        while rank[b] < rank[a] {
            b = meets[b];
        }
    }
    a
}

#[test]
fn lanes_meet_where_all_ways_do() {
    // 0: branch to 3; 1; 2: jump to 4; 3; 4: branch to 0; 5: return
    let ways = [
        [Some(1), Some(3)],
        [Some(2), None],
        [Some(4), None],
        [Some(4), None],
        [Some(5), Some(0)],
        [None, None],
    ];
    assert_eq!(meetings(&ways), [4, 2, 4, 4, 5, u32::MAX]);
}

//! Tables that move some of eight lanes to the end of a vector, in order.

/// Row `m`: which lane of eight comes to place `p` when those of `m` are moved to the end in order; 8 for
/// none.
pub(super) static RIGHT: [[u8; 8]; 256] = {
    let mut rows = [[8; 8]; 256];
    let mut m = 0;
    while m < 256 {
        let (mut lane, mut place) = (8, 8);
        while lane > 0 {
            lane -= 1;
            if m >> lane & 1 == 1 {
                place -= 1;
                rows[m][place] = lane as u8;
            }
        }
        m += 1;
    }
    rows
};

/// The same as a shuffle of the bytes of eight 16-bit lanes; places that none comes to get zero.
pub(super) static RIGHT16: [[u8; 16]; 256] = {
    let mut rows = [[0x80; 16]; 256];
    let mut m = 0;
    while m < 256 {
        let mut place = 0;
        while place < 8 {
            if RIGHT[m][place] < 8 {
                rows[m][2 * place] = 2 * RIGHT[m][place];
                rows[m][2 * place + 1] = 2 * RIGHT[m][place] + 1;
            }
            place += 1;
        }
        m += 1;
    }
    rows
};

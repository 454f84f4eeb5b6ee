//! A generator of reproducible pseudo-random numbers: the same seed gives the same sequence on every machine.
//!
//! The algorithm is SplitMix64 (Steele, Lea, Flood 2014): one addition and three mixing steps a word, so that a
//! gigabyte takes well under a second, and the n-th word can be computed without the ones before it.
//! Not for secrets. Not here: what the numbers are used for.

/// What SplitMix64 adds to its state for each word.
const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// The state of the generator.
#[derive(Clone)]
pub(crate) struct Random(u64);

impl Random {
    /// A generator that starts at `seed`.
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub(crate) const fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GAMMA);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    /// Fills `bytes` with whole words, little endian; a shorter tail gets the first bytes of one word more.
    pub(crate) fn fill(&mut self, bytes: &mut [u8]) {
        let mut words = bytes.chunks_exact_mut(8);
        for chunk in &mut words {
            chunk.copy_from_slice(&self.word().to_le_bytes());
        }
        let tail = words.into_remainder();
        if !tail.is_empty() {
            tail.copy_from_slice(&self.word().to_le_bytes()[..tail.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Random;

    #[test]
    fn the_sequence_is_splitmix64() {
        let mut random = Random::new(1_234_567);
        let words = [random.word(), random.word(), random.word()];
        assert_eq!(
            words,
            [
                6457827717110365317,
                3203168211198807973,
                9817491932198370423
            ]
        );
    }

    #[test]
    fn filling_in_pieces_of_whole_words_gives_the_same_bytes() {
        let (mut whole, mut pieces) = ([0; 24], [0; 24]);
        Random::new(7).fill(&mut whole);
        let mut random = Random::new(7);
        pieces.chunks_mut(8).for_each(|piece| random.fill(piece));
        assert_eq!(whole, pieces);
    }
}

//! ○ The KV blocks of one stage: who holds each, and what those that are full are full of.
//!
//! A block is granted with its content only where this stage has itself filled it, all of its rows, at the
//! same place of a sequence and with the same adapter, and where nobody has been granted it empty since.
//! That the tokens are the same the head alone can say: most stages never see those that were drawn.

use shoal_protocol::id::AdapterId;

/// What a full block was filled as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Filled {
    /// How many blocks of its sequence stand before it.
    pub index: usize,
    /// What its rows were computed with.
    pub adapter: Option<AdapterId>,
}

/// One block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(super) struct Slot {
    /// Open sequences that hold it.
    pub holders: u32,
    /// `None` until all of its rows have gone through this stage.
    pub filled: Option<Filled>,
}

/// All blocks of a stage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Slots(Vec<Slot>);

/// Why a block cannot be granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// There is none of that number.
    OutOfRange,
    /// An open sequence holds it.
    Held,
    /// It is not full of what it is to be shared as.
    NotShareable(&'static str),
}

impl Slots {
    /// So many, of which nothing is known.
    pub fn new(blocks: u32) -> Self {
        Self(vec![Slot::default(); blocks as usize])
    }

    /// By number.
    pub fn get(&self, block: u32) -> Option<&Slot> {
        self.0.get(block as usize)
    }

    /// How often they are held, all together.
    pub fn holders(&self) -> usize {
        self.0.iter().map(|slot| slot.holders as usize).sum()
    }

    /// Grants a block to be written. What it was before, for `put_back`.
    pub fn grant(&mut self, block: u32) -> Result<Slot, Refused> {
        let slot = self.0.get_mut(block as usize).ok_or(Refused::OutOfRange)?;
        if slot.holders > 0 {
            return Err(Refused::Held);
        }
        Ok(std::mem::replace(slot, Slot { holders: 1, filled: None }))
    }

    /// Grants a block with its content. What it was before, for `put_back`.
    pub fn share(&mut self, block: u32, as_what: Filled) -> Result<Slot, Refused> {
        let slot = self.0.get_mut(block as usize).ok_or(Refused::OutOfRange)?;
        let refused = |why| Err(Refused::NotShareable(why));
        match slot.filled {
            None => return refused("it is not full"),
            Some(filled) if filled.index != as_what.index => {
                return refused("it was filled at another place of its sequence");
            }
            Some(filled) if filled.adapter != as_what.adapter => {
                return refused("it was filled with another adapter");
            }
            Some(_) => {}
        }
        let before = *slot;
        slot.holders += 1;
        Ok(before)
    }

    /// Undoes the latest grant of a block.
    pub fn put_back(&mut self, block: u32, before: Slot) {
        if let Some(slot) = self.0.get_mut(block as usize) {
            *slot = before;
        }
    }

    /// All rows of a block have gone through.
    pub fn fill(&mut self, block: u32, filled: Filled) {
        if let Some(slot) = self.0.get_mut(block as usize) {
            slot.filled = Some(filled);
        }
    }

    /// One sequence fewer holds a block.
    pub fn release(&mut self, block: u32) {
        if let Some(slot) = self.0.get_mut(block as usize) {
            slot.holders = slot.holders.saturating_sub(1);
        }
    }
}

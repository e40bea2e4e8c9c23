//! A launch: blocks one after another, the warps of each in turn from barrier to barrier, in an order that the launch's seed
//! decides. Whether an order matters is asked of every byte (`races.rs`), so that one order is enough.

use crate::common::data::Rng;
use crate::common::device::{After, Launch, Param};
use crate::decode::decode;
use crate::memory::{Known, Memory};
use crate::ops::Kernel;
use crate::warp::{Grid, Stop, Warp};
use std::collections::BTreeMap;
use std::sync::Arc;

const WARPS: u32 = 8;

/// Every kernel of some files of PTX.
pub(crate) struct Machine {
    kernels: Arc<BTreeMap<String, Kernel>>,
    /// Whether threads that nothing orders may write where no other reads before a barrier of the block.
    forgives: bool,
}

/// What a launch left, by parameter.
pub(crate) struct Left {
    pub(crate) after: Vec<After>,
    /// Which bytes hold anything, of parameters that may be written to.
    pub(crate) known: Vec<Vec<bool>>,
}

impl Machine {
    /// # Errors
    /// What a text has that the interpreter does not know.
    pub(crate) fn new<'t>(texts: impl IntoIterator<Item = &'t str>) -> Result<Self, String> {
        let mut kernels = BTreeMap::new();
        for text in texts {
            kernels.extend(decode(text)?.into_iter().map(|kernel| (kernel.name.clone(), kernel)));
        }
        Ok(Self { kernels: Arc::new(kernels), forgives: false })
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.kernels.keys().map(|name| &name[..])
    }

    /// The same, to which it is no race that two threads write to one place, where nobody reads it before a barrier of the block.
    pub(crate) fn forgiving(&self) -> Self {
        Self { kernels: self.kernels.clone(), forgives: true }
    }

    /// Run a launch. Some bytes of the parameters in `known` hold nothing yet, whatever they are given.
    ///
    /// # Errors
    /// What a thread did that it may not, and where.
    pub(crate) fn run(&self, launch: &Launch, known: &[Known]) -> Result<Left, String> {
        let kernel = self.kernels.get(&launch.kernel);
        let kernel = kernel.ok_or_else(|| format!("no kernel is called {}", launch.kernel))?;
        let mut memory = Memory::new(&launch.params, known, (kernel.shared, kernel.granule));
        memory.forgives = self.forgives;
        memory.tables.clone_from(&kernel.tables);
        let grid = Grid { kernel, params: packed(kernel, launch, &memory)?, blocks: launch.blocks };
        let mut rng = Rng::new(launch.seed);
        let mut warps: Vec<_> = (0..WARPS).map(|warp| Warp::new(&grid, warp)).collect();
        for y in 0..launch.blocks.1 {
            for x in 0..launch.blocks.0 {
                memory.forget_shared();
                run_block(&mut warps, (x, y), &mut rng, &mut memory)?;
            }
        }
        let left = (0..launch.params.len()).map(|at| memory.left(at));
        let (bytes, known): (Vec<_>, _) = left.unzip();
        let after = bytes.into_iter().map(|bytes| After { bytes, ..After::default() }).collect();
        Ok(Left { after, known })
    }
}

/// Parameters as the kernel reads them.
fn packed(kernel: &Kernel, launch: &Launch, memory: &Memory) -> Result<Vec<u64>, String> {
    let bytes = |param: &Param| if matches!(param, Param::U32(_)) { 4 } else { 8 };
    if launch.params.iter().map(bytes).ne(kernel.params.iter().copied()) {
        return Err(format!("{} takes other parameters: {:?}", kernel.name, kernel.params));
    }
    let word = |(at, param): (usize, &Param)| match param {
        Param::U32(value) => u64::from(*value),
        Param::U64(value) => *value,
        _ => memory.address(at),
    };
    Ok(launch.params.iter().enumerate().map(word).collect())
}

fn run_block(
    warps: &mut [Warp<'_>],
    block: (u32, u32),
    rng: &mut Rng,
    memory: &mut Memory,
) -> Result<(), String> {
    warps.iter_mut().for_each(|warp| warp.begin(block));
    loop {
        (1..warps.len()).for_each(|i| warps.swap(i, (rng.next() % (i as u64 + 1)) as usize));
        let stops = warps.iter_mut().map(|warp| warp.run(memory)).collect::<Result<Vec<_>, _>>()?;
        let kind = std::mem::discriminant(&stops[0]);
        if stops.iter().any(|stop| std::mem::discriminant(stop) != kind) {
            return Err(format!("block {block:?}: warps stop differently: {stops:?}"));
        }
        if stops[0] == Stop::Done {
            return Ok(());
        }
        let answer = stops.iter().any(|stop| matches!(stop, Stop::Any { says: true, .. }));
        warps.iter_mut().zip(&stops).for_each(|(warp, stop)| warp.pass(*stop, answer));
    }
}

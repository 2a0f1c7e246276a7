//! What the plans do not reach: the program's text, its compilation for a card, broken launches.

pub(crate) mod emulation;

use std::sync::Arc;

use super::source::{self, Kind};
use super::*;

#[test]
fn kernels_are_read_from_their_source() {
    let all = source::signatures().unwrap();
    let names: std::collections::BTreeSet<&str> = all.iter().map(|s| s.name.as_str()).collect();
    assert_eq!(names.len(), all.len(), "two kernels of one name");
    assert_eq!(all.len(), source::program().matches("__global__").count());
    let fill = all.iter().find(|s| s.name == "fill").unwrap();
    assert_eq!(fill.parameters, [Kind::Pointer, Kind::Float, Kind::Integer]);
    assert!(!fill.barriers);
    assert!(all.iter().find(|s| s.name == "softmax_forward").unwrap().barriers);
}

#[test]
fn refuses_arguments_of_other_kinds() {
    let Some(device) = emulation::open() else { return };
    let device: Arc<dyn Device> = device;
    let memory = Memory::of(&device, &[1.0; 5]).unwrap();
    let wrong = [memory.view().into(), 5_usize.into(), 5_usize.into()];
    assert!(each(&*device, "fill", 5, &wrong).is_err());
    assert!(each(&*device, "fil", 5, &[]).is_err());
    each(&*device, "fill", 5, &[memory.view().into(), 2.5.into(), 4_usize.into()]).unwrap();
    assert_eq!(memory.read().unwrap(), [2.5, 2.5, 2.5, 2.5, 1.0]);
}

#[test]
#[should_panic(expected = "wrote outside")]
fn the_emulation_sees_a_kernel_that_writes_outside() {
    let Some(device) = emulation::open() else { panic!("wrote outside") };
    let device: Arc<dyn Device> = device;
    let memory = Memory::of(&device, &[1.0; 5]).unwrap();
    each(&*device, "fill", 6, &[memory.view().into(), 2.5.into(), 6_usize.into()]).unwrap();
    memory.read().unwrap();
}

/// Needs NVRTC (a library, no card).
#[cfg(feature = "cuda")]
#[test]
fn gpu_kernels_compile_for_an_h200() {
    match driver::compile_for_test() {
        Ok(length) => assert!(length > 10_000),
        Err(error) if format!("{error:#}").contains("cannot compile kernels") => {
            eprintln!("SKIPPED: no NVRTC: {error:#}");
        }
        Err(error) => panic!("{error:#}"),
    }
}

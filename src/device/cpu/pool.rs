pub struct Buffer(Vec<u64>, usize);
impl Buffer {
    pub fn uninit(bytes: usize) -> Self { Self::zeroed(bytes) }
    pub fn zeroed(bytes: usize) -> Self { Buffer(vec![0; bytes.div_ceil(8)], bytes) }
    pub fn as_slice<T: bytemuck::Pod>(&self) -> &[T] { bytemuck::cast_slice(&bytemuck::cast_slice::<u64, u8>(&self.0)[..self.1]) }
    pub fn as_mut_slice<T: bytemuck::Pod>(&mut self) -> &mut [T] { bytemuck::cast_slice_mut(&mut bytemuck::cast_slice_mut::<u64, u8>(&mut self.0)[..self.1]) }
}

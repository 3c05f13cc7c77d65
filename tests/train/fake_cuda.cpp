// A GPU that computes nothing, for tests/train/fake_cuda.py: enough of one that torch's CPU build lets fake CUDA tensors
// through its device guards and its autograd engine. To be preloaded.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace at {
using namespace c10;

struct OneGpu : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device GPU() const { return Device(DeviceType::CUDA, 0); }
  Device exchangeDevice(Device) const override { return GPU(); }
  Device getDevice() const override { return GPU(); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, GPU()); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, GPU()); }
};
impl::DeviceGuardImplRegistrar guard(DeviceType::CUDA, new OneGpu());

struct CUDAHooks : CUDAHooksInterface {  // torch looks it up by this name
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  Allocator* getPinnedMemoryAllocator() const override { return GetCPUAllocator(); }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
} // namespace at

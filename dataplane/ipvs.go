// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"context"
	"fmt"
	"net/netip"
	"os/exec"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/plimsoll-bench/plimsoll/clusters"
)

// ipvs is kube-proxy in IPVS mode.
type ipvs struct{}

var _ Mode = ipvs{}

func (ipvs) Name() string  { return "ipvs" }
func (ipvs) Doc() string   { return "kube-proxy in IPVS mode; needs ip_vs in the kernel" }
func (ipvs) Floor() string { return directConntrack{}.Name() }

// Supported asks for IPVS's netlink family. Where it is missing and the kernel has modules, ip_vs is loaded, as kube-proxy
// itself would do.
func (ipvs) Supported(ctx context.Context) error {
	if _, err := exec.LookPath("ipset"); err != nil {
		return fmt.Errorf("ipset is not installed (plimsoll doctor --install): %w", clusters.ErrNotSupported)
	}
	if _, err := netlink.GenlFamilyGet("IPVS"); err == nil {
		return nil
	}
	why := "the kernel has no ip_vs"
	if modprobe, err := exec.LookPath("modprobe"); err == nil {
		out, err := exec.CommandContext(ctx, modprobe, "ip_vs").CombinedOutput()
		if err == nil {
			return nil
		}
		if text := complaint(out); text != "" {
			why += ": " + text
		}
	}
	return fmt.Errorf("%s: %w", why, clusters.ErrNotSupported)
}

func (m ipvs) Spec(s Settings) clusters.ProxySpec {
	return clusters.ProxySpec{Name: m.Name(), KubeProxy: "ipvs", IPTables: "nft", MinSyncPeriod: s.minSyncPeriod()}
}

// getIPVSInfo is IP_VS_SO_GET_INFO of the kernel's include/uapi/linux/ip_vs.h, and ipvsInfo the struct ip_vs_getinfo that it answers.
const getIPVSInfo = 64 + 1024 + 64 + 1

type ipvsInfo struct{ version, connectionTable, services uint32 }

// Programmed is how many virtual servers of IPv4 the kernel says that it has. It does not read them: at tens of thousands that takes as long as
// kube-proxy's own work for hundreds, and is asked many times while kube-proxy is at it.
func (ipvs) Programmed(_ context.Context, site clusters.Site) (int, error) {
	var answer ipvsInfo
	err := site.Enter(func() error {
		socket, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		if err != nil {
			return err
		}
		defer unix.Close(socket)
		size := uint32(unsafe.Sizeof(answer))
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(socket), unix.IPPROTO_IP, getIPVSInfo, uintptr(unsafe.Pointer(&answer)), uintptr(unsafe.Pointer(&size)), 0)
		if errno != 0 {
			return fmt.Errorf("how many virtual servers IPVS has: %w", errno)
		}
		return nil
	})
	return int(answer.services), err
}

func (ipvs) Chain(context.Context, clusters.Site) ([]netip.AddrPort, error) { return nil, nil }

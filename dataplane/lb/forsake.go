// SPDX-License-Identifier: Apache-2.0

package lb

import (
	"errors"
	"fmt"
	"io"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// loadLeaving loads the program of Forsake. A kernel that cannot carry it is no error: Forsake says so then.
func (b *Balancer) loadLeaving(spec *ebpf.CollectionSpec, maps map[string]*ebpf.Map) error {
	if err := setConstants(spec, b.tableConstants()); err != nil {
		return err
	}
	b.forsakeErr = spec.LoadAndAssign(&b.forsake, &ebpf.CollectionOptions{MapReplacements: replacements(spec, maps)})
	if errors.Is(b.forsakeErr, ebpf.ErrMapIncompatible) {
		return b.forsakeErr
	}
	return nil
}

// Forsake ends what UDP sockets are connected to that the hooks gave a backend which their frontend does not have any more: who waits
// for an answer gets ECONNABORTED and who sends EDESTADDRREQ, and the next connect goes to another one. Sockets that are not connected ask with each datagram, and are left alone.
// It is for the sockets of the network namespace of that file, or of the process if there is none, and looks at each.
//
// Errors wrap ErrNotSupported where the kernel cannot: it needs Linux 6.5 (bpf_sock_destroy) and BTF.
func (b *Balancer) Forsake(netNS string) error {
	if b.forsakeErr != nil {
		return fmt.Errorf("leave gone backends: %w: %w", ErrNotSupported, b.forsakeErr)
	}
	return InNetNS(netNS, func() error {
		iterator, err := link.AttachIter(link.IterOptions{Program: b.forsake.Forsake})
		if err != nil {
			return fmt.Errorf("look at UDP sockets: %w", err)
		}
		defer iterator.Close()
		sockets, err := iterator.Open()
		if err != nil {
			return fmt.Errorf("look at UDP sockets: %w", err)
		}
		_, err = io.Copy(io.Discard, sockets)
		return errors.Join(err, sockets.Close())
	})
}

// SPDX-License-Identifier: Apache-2.0

package lb

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// beLiberal is a flag of what conntrack met in its middle: IP_CT_TCP_FLAG_BE_LIBERAL (include/uapi/linux/netfilter/nf_conntrack_tcp.h).
const beLiberal = 0x08

// ForgetPickedUp has conntrack forget the TCP connections that it met in their middle and that have been reset since, and returns how many.
// It is for the time before KeepNAT drops what is invalid. Errors wrap ErrNotSupported where the kernel has no conntrack by netlink.
//
// Where conntrack begins it takes whoever it sees first for the client (tcp_new in net/netfilter/nf_conntrack_proto_tcp.c). Where that was the
// server, and the connection was reset, a SYN of its true client is invalid for nf_conntrack_tcp_timeout_close, 10 s, after the entry's last packet
// (tcp_conntracks: a SYN of the answering side in the state CLOSE).
func (b *Balancer) ForgetPickedUp() (forgotten int, err error) {
	if b.options.Packets == nil {
		return 0, nil
	}
	err = InNetNS(b.options.Packets.NetNS, func() error {
		var entries [][]byte // not many, in place of all that there are
		dump := conntrackRequest(nl.IPCTNL_MSG_CT_GET, unix.NLM_F_DUMP)
		dump.AddData(&nl.Nfgenmsg{NfgenFamily: unix.AF_UNSPEC, Version: nl.NFNETLINK_V0})
		err := dump.ExecuteIter(unix.NETLINK_NETFILTER, 0, func(entry []byte) bool {
			if isPickedUp(entry) {
				entries = append(entries, bytes.Clone(entry))
			}
			return true
		})
		if errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("%w: conntrack by netlink (CONFIG_NF_CT_NETLINK): %w", ErrNotSupported, err)
		} else if err != nil && !errors.Is(err, nl.ErrDumpInterrupted) { // what came while the table changed is true all the same
			return err
		}
		var errs []error
		for _, entry := range entries {
			// It has the entry's id, so that another one from the same port stays.
			request := conntrackRequest(nl.IPCTNL_MSG_CT_DELETE, unix.NLM_F_ACK)
			request.AddRawData(entry)
			if _, err := request.Execute(unix.NETLINK_NETFILTER, 0); err == nil {
				forgotten++
			} else if !errors.Is(err, unix.ENOENT) {
				errs = append(errs, err)
			}
		}
		return errors.Join(errs...)
	})
	if err != nil {
		err = fmt.Errorf("packet path: forget connections from before conntrack: %w", err)
	}
	return forgotten, err
}

func conntrackRequest(operation, flags int) *nl.NetlinkRequest {
	return nl.NewNetlinkRequest(unix.NFNL_SUBSYS_CTNETLINK<<8|operation, flags)
}

// isPickedUp tells whether an entry, as it is in an answer to a dump, is one that ForgetPickedUp is about.
func isPickedUp(entry []byte) bool {
	if len(entry) < nl.SizeofNfgenmsg {
		return false
	}
	attributes := entry[nl.SizeofNfgenmsg:]
	if attribute(attributes, nl.CTA_TUPLE_ORIG) == nil { // a request without one has all entries forgotten
		return false
	}
	tcp := attribute(attribute(attributes, nl.CTA_PROTOINFO), nl.CTA_PROTOINFO_TCP)
	state, flags := attribute(tcp, nl.CTA_PROTOINFO_TCP_STATE), attribute(tcp, nl.CTA_PROTOINFO_TCP_FLAGS_ORIGINAL)
	return len(state) > 0 && state[0] == nl.TCP_CONNTRACK_CLOSE && len(flags) > 0 && flags[0]&beLiberal != 0
}

// attribute is the value of the first attribute of a kind, nil if there is none.
func attribute(attributes []byte, kind uint16) []byte {
	all, err := nl.ParseRouteAttr(attributes)
	if err != nil {
		return nil
	}
	for _, a := range all {
		if a.Attr.Type&nl.NLA_TYPE_MASK == kind {
			return a.Value
		}
	}
	return nil
}

// SPDX-License-Identifier: Apache-2.0

package lb

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// What conntrack says of a TCP connection (include/uapi/linux/netfilter/nfnetlink_conntrack.h and nf_conntrack_tcp.h).
const (
	ctaProtoInfoTCP              = 1 // CTA_PROTOINFO_TCP
	ctaProtoInfoTCPState         = 1
	ctaProtoInfoTCPFlagsOriginal = 4
	beLiberal                    = 0x08 // IP_CT_TCP_FLAG_BE_LIBERAL: of what it met in its middle
)

// ForgetPickedUp has conntrack forget the TCP connections that were there before it and have been reset since, and returns how many.
//
// It takes whoever it sees first for the client. Where that was the server, what the true client begins from the same port is invalid for as
// long as the entry stays: nf_conntrack_tcp_timeout_close, 10 s, which begins anew with each such connection. KeepNAT has it dropped.
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
				entries = append(entries, entry)
			}
			return true
		})
		if err != nil && !errors.Is(err, nl.ErrDumpInterrupted) { // what came while the table changed is true all the same
			return err
		}
		for _, entry := range entries {
			// It has the entry's id, so that another one from the same port stays.
			request := conntrackRequest(nl.IPCTNL_MSG_CT_DELETE, unix.NLM_F_ACK)
			request.AddRawData(entry)
			if _, err := request.Execute(unix.NETLINK_NETFILTER, 0); err == nil {
				forgotten++
			} else if !errors.Is(err, unix.ENOENT) {
				return err
			}
		}
		return nil
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
	tcp := attribute(attribute(entry[nl.SizeofNfgenmsg:], nl.CTA_PROTOINFO), ctaProtoInfoTCP)
	state, flags := attribute(tcp, ctaProtoInfoTCPState), attribute(tcp, ctaProtoInfoTCPFlagsOriginal)
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

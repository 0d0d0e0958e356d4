// SPDX-License-Identifier: Apache-2.0

package load

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"sync"
	"time"
)

// maxDatagram is the largest datagram that is echoed, in bytes.
const maxDatagram = 2048

// identify tells every client of l the server's name until ctx ends.
func (s *server) identify(ctx context.Context, l *net.TCPListener) {
	var talking sync.WaitGroup
	defer talking.Wait()
	defer context.AfterFunc(ctx, func() { l.Close() })()
	for {
		c, err := l.AcceptTCP()
		if err != nil {
			// Package net retries when a client went away; what is left is the end, or no file descriptor to spare.
			select {
			case <-time.After(drainEvery):
				continue
			case <-ctx.Done():
				return
			}
		}
		talking.Go(func() { s.talk(ctx, c) })
	}
}

// talk names the server at the beginning of a connection and after each line, until the client closes or ctx ends.
func (s *server) talk(ctx context.Context, c *net.TCPConn) {
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	if err := c.SetLinger(0); err != nil {
		return // the client has reset it
	}
	scanner := bufio.NewScanner(c)
	for {
		if _, err := fmt.Fprintln(c, s.options.Name); err != nil {
			return
		}
		if !scanner.Scan() {
			return
		}
	}
}

// echo answers datagrams with the server's name and what they carried until ctx ends.
func (s *server) echo(ctx context.Context, c *net.UDPConn) {
	defer context.AfterFunc(ctx, func() { c.Close() })()
	question := make([]byte, maxDatagram)
	for {
		n, from, err := c.ReadFromUDPAddrPort(question)
		if err != nil {
			return // the end: ICMP errors do not reach an unconnected socket
		}
		reply := append([]byte(s.options.Name+"\n"), question[:n]...)
		if _, err := c.WriteToUDPAddrPort(reply, from); err != nil {
			continue // the client cannot be reached; if it still waits it counts a time-out
		}
	}
}
